"""Formats of the console, where Django looks for them (FORMAT_MODULE_PATH)."""

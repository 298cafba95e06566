"""GGUF files as bytes: headers read with bounds, and models in several files. Pure; no llama.cpp."""

"""Two LoRA adapters for the demo model as package data, and the script that makes such adapters (README.md)."""

"""Hugging Face checkpoint to GGUF in one pass, and the demo checkpoint."""

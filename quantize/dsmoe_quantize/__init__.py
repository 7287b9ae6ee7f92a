"""Encoding weights: ggml types and kernels, mixes and recipes, the streaming encoder, GGUF to GGUF."""

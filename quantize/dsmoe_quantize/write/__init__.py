"""How a GGUF file gets written: ggml's kernels, the encoder, its threads, and crash-safe output."""

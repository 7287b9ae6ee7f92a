"""A small DeepSeekMoE with real weights, made offline: SmolLM2-135M, upcycled. Needs the `demo` extra."""

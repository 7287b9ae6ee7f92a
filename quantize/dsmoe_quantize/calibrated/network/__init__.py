"""A model's layers in torch, with weights from a GGUF file: one layer at a time, all tokens at once."""

"""Loads models: memory, placement on devices, and models larger than the memory."""

"""Loads models: available memory, placement on devices, paging of models larger than the memory."""

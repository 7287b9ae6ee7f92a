"""Observers, which read graph nodes and logits while a model runs and return summaries."""

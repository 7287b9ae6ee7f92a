"""Observers: what looks inside a model while it runs, next to the logits, and returns summaries."""

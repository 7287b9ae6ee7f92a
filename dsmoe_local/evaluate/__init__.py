"""Measures models: perplexity, divergence from a reference, routing fidelity."""

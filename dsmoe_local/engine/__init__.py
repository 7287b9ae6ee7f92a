"""Runs a model through llama.cpp; the only package that touches llama_cpp."""

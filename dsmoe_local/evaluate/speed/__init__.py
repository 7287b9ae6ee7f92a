"""Benchmarks of `dsmoe bench`: the speed of models, the bytes read per token, and the memory bandwidth."""

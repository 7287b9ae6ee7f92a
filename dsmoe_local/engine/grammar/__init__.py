"""Compiles GBNF grammars and JSON schemas for llguidance. Needs no model and no vocabulary.

llama.cpp's own grammars are not used: some inputs abort the process or never end. Here a hostile grammar is
refused, or only its own request fails.
"""

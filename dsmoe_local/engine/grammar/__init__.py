"""Grammars that a reply is held to: GBNF and JSON schemas, read here and matched by llguidance.

Text in, text out: no model, no vocabulary, no native code of llama.cpp. llama.cpp's own grammars abort the
process on some inputs and never end on others; here a hostile grammar is refused, or its request fails.
"""

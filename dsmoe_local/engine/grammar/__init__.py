"""Languages that a reply may be held to: GBNF and JSON schemas, and the automaton that recognizes them.

Plain data and Python: no model, no vocabulary, no native code. llama.cpp's own grammars end the process on
some inputs and never end on others; here a hostile grammar is refused, or its request fails.
"""

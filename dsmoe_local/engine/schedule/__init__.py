"""Plans which tokens of which request are decoded next. Needs no model, no tokenizer and no native code."""

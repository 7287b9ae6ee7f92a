"""Which tokens of which request are decoded next. Pure data: no model, no tokenizer, no native code."""

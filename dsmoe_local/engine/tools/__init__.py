"""Tool calls: the formats in which models write them, a parser, and grammars."""

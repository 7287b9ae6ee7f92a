"""Draws Markdown for a terminal, also while it is still being written. Knows no terminal and no chat."""

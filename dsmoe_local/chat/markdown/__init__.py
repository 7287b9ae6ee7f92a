"""Markdown that is still being written, block by block. Knows no terminal and no conversation."""

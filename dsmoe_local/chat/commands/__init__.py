"""Slash commands: how one is declared, the table of all, and one module for each group of them."""

"""A conversation as a file worth sending: Markdown, JSON, HTML."""

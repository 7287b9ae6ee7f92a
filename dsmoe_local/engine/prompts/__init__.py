"""Prompts to token ids: chat templates, their sandbox, and the encoder."""

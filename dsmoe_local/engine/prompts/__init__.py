"""Prompts to token ids: chat templates, the process and the sandbox they run in, and the encoder."""

"""Encodes prompts: chat templates, the process and the sandbox that render them, and the encoder."""

"""Stored chats: sessions and their turns in SQLite, and KV states in files next to it."""

"""What outlives a chat: sessions and their turns in SQLite, and KV states beside them."""

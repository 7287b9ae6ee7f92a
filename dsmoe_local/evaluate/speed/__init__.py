"""How fast models are, what they read for it, and what the machine could read: what `dsmoe bench` shows."""

"""Which type each tensor gets: llama.cpp's mixes, our recipes, recipe files, and the user's overrides."""

"""The activity of a model's experts as numbers, tables and pictures."""

"""The activity of a model's experts: numbers, tables and pictures."""

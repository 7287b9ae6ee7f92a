"""From options to a loaded model: what fits, where it goes, and how it is told."""

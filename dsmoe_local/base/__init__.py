"""What every layer may use: durable files, safe text, errors, paths, progress. Knows nothing of models."""

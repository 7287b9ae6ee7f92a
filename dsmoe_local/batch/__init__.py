"""JSONL in, JSONL out, no record lost. Leaves inference to the engine."""

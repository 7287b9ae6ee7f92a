"""The terminal conversation: reading, rendering, keeping turns. Leaves inference to the engine."""

"""The layer-streaming engine: one decoder block in memory at a time."""

"""Quantized checkpoints on disk: the format, its writer and its strict reader."""

"""Conversion of a checkpoint to formats that other programs read."""

from quantlab.checkpoint.export.convert import FORMATS, export

__all__ = ["FORMATS", "export"]

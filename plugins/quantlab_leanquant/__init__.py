"""LeanQuant (arXiv:2407.10032): a look-up table per row, fitted where errors cost most, and error feedback."""

from quantlab_leanquant.quantizer import LeanquantQuantizer

__all__ = ["LeanquantQuantizer"]

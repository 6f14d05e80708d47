"""LNQ (arXiv:2505.07004): a look-up table per row, fitted in turn with its codes by exact descent."""

from quantlab_lnq.quantizer import LnqQuantizer

__all__ = ["LnqQuantizer"]

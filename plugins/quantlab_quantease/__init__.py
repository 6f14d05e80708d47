"""QuantEase (arXiv:2309.01885): a uniform grid, and codes refined by coordinate descent, with or without outliers."""

from quantlab_quantease.quantizer import QuanteaseQuantizer

__all__ = ["QuanteaseQuantizer"]

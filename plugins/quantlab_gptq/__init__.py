"""GPTQ (arXiv:2210.17323): a uniform grid, and rounding that makes up for its own errors."""

from quantlab_gptq.quantizer import GptqQuantizer

__all__ = ["GptqQuantizer"]

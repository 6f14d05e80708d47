"""GANQ (arXiv:2501.12956): a look-up table per row, fitted jointly with its codes to the layer's output."""

from quantlab_ganq.quantizer import GanqQuantizer

__all__ = ["GanqQuantizer"]

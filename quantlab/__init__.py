"""quantlab: the laboratory for weight-only post-training quantization of language models."""

from quantlab._version import __version__

__all__ = ["__version__"]

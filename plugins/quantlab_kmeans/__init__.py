"""k-means: a look-up table per row or group, fitted to the weights alone."""

from quantlab_kmeans.quantizer import KmeansQuantizer

__all__ = ["KmeansQuantizer"]

"""RTN: round every weight to the nearest level of a min-max grid."""

from quantlab_rtn.quantizer import RtnQuantizer

__all__ = ["RtnQuantizer"]

"""The shared backend of quantized linear layers: `torch.ops.quantlab.lut_matmul` and its prepared twin.

Importing the package registers the operations. It depends on torch alone and knows no quantization method.
"""

from quantlab_kernels import ops as ops
from quantlab_kernels.native import status
from quantlab_kernels.packing import pack_codes, unpack_codes
from quantlab_kernels.prepare import PreparedWeight, prepare, split
from quantlab_kernels.reference import dequantize, uniform_levels

__all__ = ["PreparedWeight", "dequantize", "pack_codes", "prepare", "split", "status", "uniform_levels", "unpack_codes"]

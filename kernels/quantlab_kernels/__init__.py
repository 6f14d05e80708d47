"""The shared backend of quantized linear layers: one operation, `torch.ops.quantlab.lut_matmul`.

Importing the package registers the operation. It depends on torch alone and knows no quantization method.
"""

from quantlab_kernels import ops as ops
from quantlab_kernels.packing import pack_codes, unpack_codes
from quantlab_kernels.reference import dequantize

__all__ = ["dequantize", "pack_codes", "unpack_codes"]

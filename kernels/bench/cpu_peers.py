"""Multiplications with quantized weights that others offer on the CPU, for `lut_matmul.py --peers`.

All of them are uniform: a weight is a scale times a small integer, which takes no table. Ours looks every weight up.
They store 4 bits with a scale for each 128 columns of a row, or 8 bits with a scale for each row.

Those of PyTorch are always there, and take x in bfloat16: with float32 they run without vector instructions. Those of
ONNX Runtime take x in float32, need `pip install onnxruntime onnx`, and are left out without.
"""

import importlib.util
from collections.abc import Callable
from itertools import cycle

import numpy as np
import torch
from torch import Tensor
from variants import SMALL_ROWS, Variant, cold_copies

BLOCK = 128  # columns that share a scale
ACCURACY_LEVELS = {"fp32": 1, "int8": 4}  # what ONNX Runtime rounds x to before it multiplies


def peer_variants(shape: tuple[int, int]) -> list[Variant]:
    """All that are installed, for one sample."""
    variants = [torch_int4_variant(shape), torch_int8_variant(shape)]
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        variants += [onnx_variant(shape, name) for name in ACCURACY_LEVELS]
    return variants


def torch_int4_variant(shape: tuple[int, int]) -> Variant:
    """`torch.ops.aten._weight_int4pack_mm_for_cpu`."""
    rows, columns = shape
    scales = torch.rand(columns // BLOCK, rows, 2).bfloat16()
    x = torch.randn(1, columns).bfloat16()

    def call(rows: int) -> Callable[[], Tensor]:
        codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
        weight, own = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2), scales[:, :rows].clone()
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, BLOCK, own)

    return variant("torch int4 bf16", rows * columns // 2 + scales.nbytes, call, rows)


def torch_int8_variant(shape: tuple[int, int]) -> Variant:
    """`torch._weight_int8pack_mm`."""
    rows, columns = shape
    scales = torch.rand(rows).bfloat16()
    x = torch.randn(1, columns).bfloat16()

    def call(rows: int) -> Callable[[], Tensor]:
        weight, own = torch.randint(-128, 128, (rows, columns), dtype=torch.int8), scales[:rows].clone()
        return lambda: torch._weight_int8pack_mm(x, weight, own)

    return variant("torch int8 bf16", rows * columns + scales.nbytes, call, rows)


def variant(name: str, nbytes: int, call: Callable[[int], Callable[[], Tensor]], rows: int) -> Variant:
    """`call` makes a call with a weight of its own with so many rows."""
    return Variant(name, nbytes, cycle([call(rows) for _ in range(cold_copies(nbytes))]), call(SMALL_ROWS))


def onnx_variant(shape: tuple[int, int], compute: str) -> Variant:
    """`MatMulNBits` of ONNX Runtime; one call multiplies with all copies, so that calling costs it next to nothing."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    rows, columns = shape
    random = np.random.default_rng(0)
    blocks = columns // BLOCK
    nbytes = rows * columns // 2 + rows * blocks * 4
    copies = cold_copies(nbytes)

    def model(rows: int, copies: int) -> bytes:
        nodes, weights = [], []
        for index in range(copies):
            codes = random.integers(0, 256, (rows, blocks, BLOCK // 2), dtype=np.uint8)
            scales = random.random(rows * blocks, dtype=np.float32)
            weights += [
                onnx.numpy_helper.from_array(codes, f"w{index}"),
                onnx.numpy_helper.from_array(scales, f"s{index}"),
            ]
            attributes = {"K": columns, "N": rows, "bits": 4, "block_size": BLOCK}
            attributes["accuracy_level"] = ACCURACY_LEVELS[compute]
            inputs, outputs = ["x", f"w{index}", f"s{index}"], [f"y{index}"]
            nodes.append(helper.make_node("MatMulNBits", inputs, outputs, domain="com.microsoft", **attributes))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, columns))
        ys = [helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT, (1, rows)) for index in range(copies)]
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph(nodes, "copies", [x], ys, weights)
        return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())

    def call(rows: int, copies: int) -> Callable[[], object]:
        content, sessions = model(rows, copies), {}
        x = {"x": random.standard_normal((1, columns), dtype=np.float32)}

        def run() -> object:
            threads = torch.get_num_threads()
            if threads not in sessions:
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = threads
                # Else its threads would wait busily while other variants are timed.
                options.add_session_config_entry("session.force_spinning_stop", "1")
                sessions.clear()
                sessions[threads] = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            return sessions[threads].run(None, x)

        return run

    name = f"onnxruntime int4 {compute}"
    return Variant(name, nbytes, cycle([call(rows, copies)]), call(SMALL_ROWS, 1), products=copies)

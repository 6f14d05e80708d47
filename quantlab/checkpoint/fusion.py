"""Which layers of a model read the same input."""

from torch import nn

from quantlab.runtime import LutLinear, fuse

SAME_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_a_proj", "kv_a_proj_with_mqa"),  # latent attention
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),  # linear attention of Qwen
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Names of layers that get the same input if they are in one module; those that do not are separated at run time."""


def fuse_layers(model: nn.Module) -> None:
    """Fuse the quantized layers of a model that read the same input (`quantlab.runtime.fuse`)."""
    for module in model.modules():
        for names in SAME_INPUT:
            layers = [getattr(module, name, None) for name in names]
            fuse([layer for layer in layers if isinstance(layer, LutLinear)])

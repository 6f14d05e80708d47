"""What a checkpoint from anywhere may make this program hold in memory, and how many steps it may make it take.

Tensors need no cap of their own: their shapes are those of the model, the model is bounded by what lies on the
disk (`quantlab.checkpoint.guard`), and a shard that holds less than it announces is refused.
"""

from typing import Final

MAX_JSON_BYTES: Final = 64 << 20
"""Largest config.json, index, manifest or safetensors header. A checkpoint of 70,000 layers needs a third of it."""

MAX_LAYERS: Final = 4096
"""Largest number of layers of any kind that config.json may announce."""

MAX_SIZE: Final = (1 << 31) - 1
"""Largest whole number in config.json."""

MAX_BUFFER_BYTES: Final = 1 << 30
"""Largest sum of the tensors that a model computes from config.json alone, such as rotary tables and masks."""

WEIGHTS_PER_STORED_BYTE: Final = 4
"""A weight takes at least two bits."""

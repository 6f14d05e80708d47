"""The quantized linear layer as it runs.

The engine puts a `LutLinear` in the place of every layer it has solved, and the reader puts the same module
in the place of every layer a checkpoint lists. Both therefore compute with the same stored numbers, and a
loaded model answers the same batches bit for bit as the one that was calibrated.

On its first use a layer brings its codes into the layout of the kernel and frees the stored bit planes; whoever
asks for them (a state dict, a move to another device) gets them back unchanged. Layers that read the same input can
be prepared as one weight (`fuse`), which one call then multiplies with.
"""

import math
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

import quantlab_kernels
from quantlab.api import CodebookSpec, Lut, Outliers, QuantizedLayer
from quantlab.errors import NumericalError
from quantlab.finite import all_finite

CODEBOOK_DTYPE = torch.float16

CodebookKind = Literal["lut", "uniform"]

MOST_LOSSES = 3
"""In a row: how often outputs of fused layers may be computed in vain."""
ALIGNED_ROWS = 32
"""Fused outputs of so many rows start at multiples of 64 bytes, like all tensors of PyTorch."""

# Held while a layer changes its layout, which is rare. One lock for all, since modules must be copyable.
_LAYOUT_LOCK = threading.RLock()


@dataclass(frozen=True)
class ModuleSpec:
    """How one linear layer is stored.

    Attributes:
        out_features: rows of the weight.
        in_features: columns of the weight.
        bits: code width, 2 to 8.
        group_size: inputs that share a codebook, a divisor of in_features; None means one codebook per row.
        codebook: "lut" for free levels, "uniform" for scale and zero.
        outliers: stored additive corrections.
        bias: whether the layer has a bias.

    Raises:
        ValueError: on construction, if a value is out of range.
    """

    out_features: int
    in_features: int
    bits: int
    group_size: int | None
    codebook: CodebookKind
    outliers: int
    bias: bool

    def __post_init__(self) -> None:
        if self.out_features < 1 or self.in_features < 1:
            raise ValueError(f"a weight of shape ({self.out_features}, {self.in_features}) is empty")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits} must be between 2 and 8")
        if self.group_size is not None and (self.group_size < 1 or self.in_features % self.group_size):
            raise ValueError(f"group_size={self.group_size} must divide in_features={self.in_features}")
        if self.codebook not in ("lut", "uniform"):
            raise ValueError(f"codebook={self.codebook!r} must be 'lut' or 'uniform'")
        if not 0 <= self.outliers <= self.out_features * self.in_features:
            raise ValueError(f"outliers={self.outliers} must be between 0 and the number of weights")

    @property
    def groups(self) -> int:
        """Codebooks per output row."""
        return 1 if self.group_size is None else self.in_features // self.group_size


Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def storage_layout(spec: ModuleSpec) -> Layout:
    """The tensors that store a weight, bias excepted: name to dtype and shape."""
    rows, groups = spec.out_features, spec.groups
    layout: Layout = {"packed_codes": (torch.int32, (spec.bits, rows, -(-spec.in_features // 32)))}
    if spec.codebook == "lut":
        layout["codebook"] = (CODEBOOK_DTYPE, (rows, groups, 1 << spec.bits))
    else:
        layout["scale"] = (CODEBOOK_DTYPE, (rows, groups))
        layout["zero"] = (CODEBOOK_DTYPE, (rows, groups))
    if spec.outliers:
        layout["outlier_offsets"] = (torch.int32, (rows + 1,))
        layout["outlier_columns"] = (torch.int32, (spec.outliers,))
        layout["outlier_values"] = (CODEBOOK_DTYPE, (spec.outliers,))
    return layout


class LutLinear(nn.Module):
    """A linear layer whose weight is codes into a codebook, plus optional additive outliers.

    Casting the module (`.to(torch.bfloat16)`, `.half()`) casts the bias only: the stored weight is the result
    of the quantization and must not be rounded again.

    Attributes:
        spec: sizes and kind of storage.
        in_features: width of the input.
        out_features: width of the output.
        bias: (out_features,) or None.
    """

    bias: Tensor | None
    packed_codes: Tensor | None
    prepared_codes: Tensor | None

    def __init__(self, spec: ModuleSpec, tensors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        """Wrap stored tensors.

        Args:
            spec: what is stored.
            tensors: exactly the tensors of `storage_layout(spec)`.
            bias: (out_features,) if `spec.bias`, otherwise None.

        Raises:
            ValueError: a tensor is missing, unexpected, or of the wrong dtype or shape.
        """
        super().__init__()
        layout = storage_layout(spec)
        if tensors.keys() != layout.keys():
            raise ValueError(f"tensors are {sorted(tensors)}; this layer stores {sorted(layout)}")
        for name, (dtype, shape) in layout.items():
            tensor = tensors[name]
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; expected {dtype} {shape}")
            self.register_buffer(name, tensor)
        bias_shape = None if bias is None else tuple(bias.shape)
        if bias_shape != ((spec.out_features,) if spec.bias else None):
            raise ValueError(
                f"bias has shape {bias_shape}; expected {spec.out_features} values if and only if spec.bias"
            )
        self.register_buffer("bias", bias)
        self.register_buffer("prepared_codes", None, persistent=False)
        self._prepared: quantlab_kernels.PreparedWeight | None = None
        self._fused: FusedLayers | None = None
        self.spec = spec
        self.in_features = spec.in_features
        self.out_features = spec.out_features

    @classmethod
    def from_layer(cls, layer: QuantizedLayer, spec: CodebookSpec, bias: Tensor | None) -> Self:
        """Store the answer of a method.

        Args:
            layer: codes, codebook and outliers.
            spec: the storage budget that the layer was solved for.
            bias: (out_features,) or None, kept in its dtype.

        Raises:
            ValueError: the layer does not have the shape that the budget implies.
            NumericalError: a value is not finite, or too large, in float16.
        """
        module_spec = ModuleSpec(
            out_features=layer.codes.shape[0],
            in_features=layer.codes.shape[1],
            bits=spec.bits,
            group_size=spec.group_size,
            codebook="lut" if isinstance(layer.codebook, Lut) else "uniform",
            outliers=0 if layer.outliers is None else layer.outliers.values.numel(),
            bias=bias is not None,
        )
        tensors = {"packed_codes": quantlab_kernels.pack_codes(layer.codes, spec.bits)}
        if isinstance(layer.codebook, Lut):
            tensors["codebook"] = _to_storage("codebook", layer.codebook.values)
        else:
            tensors["scale"] = _to_storage("scale", layer.codebook.scale)
            tensors["zero"] = _to_storage("zero", layer.codebook.zero)
        if layer.outliers is not None and module_spec.outliers:
            tensors |= _compress_rows(layer.outliers, module_spec.out_features)
        return cls(module_spec, tensors, None if bias is None else bias.detach().clone())

    @classmethod
    def empty(cls, spec: ModuleSpec, *, bias_dtype: torch.dtype = torch.float32) -> Self:
        """A placeholder without memory, on the meta device, to load stored tensors into."""
        tensors = {
            name: torch.empty(shape, dtype=dtype, device="meta")
            for name, (dtype, shape) in storage_layout(spec).items()
        }
        bias = torch.empty(spec.out_features, dtype=bias_dtype, device="meta") if spec.bias else None
        return cls(spec, tensors, bias)

    @property
    def storage_bits(self) -> int:
        """Bits that store the weight: codes with their padding, codebook, outliers; not the bias."""
        layout = storage_layout(self.spec).values()
        return 8 * sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout)

    def dequantize(self) -> Tensor:
        """The dense weight that `forward` multiplies with: (out_features, in_features) float32."""
        codebook, zero = self._codebook()
        if zero is not None:
            codebook = quantlab_kernels.uniform_levels(codebook, zero, self.spec.bits)
        return quantlab_kernels.dequantize(
            self.get_buffer("packed_codes"), codebook, self.in_features, *self._outliers()
        )

    def forward(self, x: Tensor) -> Tensor:
        """X Wᵀ + bias: (..., in_features) to (..., out_features), in the type of x, or in that of autocast.

        Differentiable in x; the derivative dequantizes the weight.
        """
        if _is_autocast(x):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.is_grad_enabled() and x.requires_grad:
            differentiable: Tensor = _Multiplication.apply(x, self)  # type: ignore[no-untyped-call]
            return differentiable
        return self._multiply(x)

    def prepare(self, dtype: torch.dtype) -> None:
        """Bring the codes into the layout of the kernel now rather than at the first use.

        Compiled code takes the codes as it finds them and does not prepare anything.

        Args:
            dtype: the type of the inputs to come.
        """
        with _LAYOUT_LOCK:
            fused = self._fused  # read once, since another thread may separate the layers
            if self._is_prepared_for(dtype) or (fused is not None and fused.prepare(dtype)):
                return
            self._restore()
            packed_codes, (codebook, zero) = self.get_buffer("packed_codes"), self._codebook()
            self._hold(quantlab_kernels.prepare(packed_codes, codebook, zero, self.in_features, dtype))

    def separate(self) -> None:
        """Undo `fuse` for this layer and those that it was fused with."""
        if (fused := self._fused) is not None:
            fused.separate()

    def get_buffer(self, target: str) -> Tensor:
        """A buffer by name. Bit planes that were freed are made again, as a copy."""
        prepared = self._prepared
        if target == "packed_codes" and prepared is not None and prepared.restore is not None:
            return prepared.restore(prepared)
        return super().get_buffer(target)

    def extra_repr(self) -> str:
        """The sizes, for `print(model)`."""
        return ", ".join(f"{name}={value}" for name, value in vars(self.spec).items())

    def _multiply(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            if not self._is_prepared_for(x.dtype):
                self.prepare(x.dtype)
            fused = self._fused  # read once, as above
            if fused is not None and (output := fused.multiply(self, x)) is not None:
                return output
        prepared = self._prepared
        if prepared is None or not self._is_prepared_for(x.dtype):
            codebook, zero = self._codebook()
            result: Tensor = torch.ops.quantlab.lut_matmul(
                x, self.get_buffer("packed_codes"), codebook, self.bias, *self._outliers(), zero
            )
        else:
            result = torch.ops.quantlab.lut_matmul_prepared(
                x, prepared.codes, prepared.codebook, prepared.zero, prepared.layout, self.bias, *self._outliers()
            )
        return result

    def _is_prepared_for(self, dtype: torch.dtype) -> bool:
        return self._prepared is not None and self._prepared.dtype in (None, dtype)

    def _hold(self, prepared: quantlab_kernels.PreparedWeight | None) -> None:
        """Multiply with a prepared weight from now on, and free what it gives back."""
        self._prepared = prepared
        if prepared is not None and prepared.restore is not None:
            self.prepared_codes = prepared.codes
            self.packed_codes = None

    def _restore(self) -> None:
        """Return to the stored form."""
        with _LAYOUT_LOCK:
            if (fused := self._fused) is not None:
                fused.forget()
            if self._prepared is not None:
                self.packed_codes = self.get_buffer("packed_codes")
                self.prepared_codes = None
                self._prepared = None

    def _codebook(self) -> tuple[Tensor, Tensor | None]:
        """The codebook, or scale and zero."""
        if self.spec.codebook == "lut":
            return self.get_buffer("codebook"), None
        return self.get_buffer("scale"), self.get_buffer("zero")

    def _outliers(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if not self.spec.outliers:
            return None, None, None
        return (
            self.get_buffer("outlier_offsets"),
            self.get_buffer("outlier_columns"),
            self.get_buffer("outlier_values"),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._restore()
        stored = {name: self.get_buffer(name) for name in storage_layout(self.spec)}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in stored.items():
            after = self.get_buffer(name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}packed_codes"] = self.get_buffer("packed_codes")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class _Outputs:
    """What the layers that have not been called yet will return for an input."""

    x: weakref.ref[Tensor]
    state: tuple[Any, ...]
    waiting: dict[LutLinear, Tensor]


class FusedLayers:
    """Layers that read the same input, prepared as one weight; see `fuse`.

    The layer that is called first with a sample computes the outputs of all, and each of the others takes its own when
    it is called with the same tensor: the same object, unchanged since. A layer that is called with anything else is
    the first again. Outputs that nobody took are dropped, and layers that leave some again and again are separated.
    """

    def __init__(self, layers: Sequence[LutLinear]) -> None:
        """Prepare from now on as one; the layers differ in nothing but numbers of rows and outliers.

        Args:
            layers: none of them fused with others.
        """
        self._layers = tuple(layers)
        self._joined: LutLinear | None = None
        self._outputs: _Outputs | None = None
        self._losses = 0
        for layer in layers:
            layer._fused = self

    def prepare(self, dtype: torch.dtype) -> bool:
        """Prepare all layers. If the backend cannot, or they are not in one place, they are separated: False."""
        for layer in self._layers:
            layer._restore()
        parts = None
        # Not in inference mode: the tensors outlive it.
        with torch.inference_mode(False), torch.no_grad():
            if self._can_be_joined():
                joined = self._join()
                joined.prepare(dtype)
                if joined._prepared is not None:
                    parts = quantlab_kernels.split(joined._prepared, [layer.out_features for layer in self._layers])
        if parts is None:
            self.separate()
            return False
        for layer, part in zip(self._layers, parts, strict=True):
            layer._hold(part)
        self._joined = joined
        return True

    def multiply(self, layer: LutLinear, x: Tensor) -> Tensor | None:
        """The output of a layer, or None if it should compute it alone."""
        joined = self._joined
        # One sample: outputs of several would have to be copied out of their rows. In inference mode tensors do not
        # tell whether they have been changed, and autocast makes a new one for every layer.
        if joined is None or x.numel() != joined.in_features or x.is_inference() or _is_autocast(x):
            return None
        outputs, state = self._outputs, _state(x)
        if outputs is not None and outputs.x() is x and outputs.state == state:
            output = outputs.waiting.pop(layer, None)
            if output is not None:
                return output
        self._losses = self._losses + 1 if outputs is not None and outputs.waiting else 0
        if self._losses == MOST_LOSSES:
            self.separate()
            return None
        rows = [each.out_features for each in self._layers]
        computed = torch.unsafe_split_with_sizes(joined._multiply(x), rows, -1)  # they are no views of each other
        waiting = dict(zip(self._layers, computed, strict=True))
        output = waiting.pop(layer)
        self._outputs = _Outputs(weakref.ref(x), state, waiting)
        return output

    def forget(self) -> None:
        """Let go of the common weight; the next layer that has to be prepared makes a new one."""
        self._joined = self._outputs = None

    def separate(self) -> None:
        """Let every layer go its own way. Those that are prepared stay so."""
        for layer in self._layers:
            layer._fused = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_outputs": None}

    def _can_be_joined(self) -> bool:
        kinds = {
            tuple((name, buffer.dtype, buffer.device) for name, buffer in layer.named_buffers())
            for layer in self._layers
        }
        return len(kinds) == 1

    def _join(self) -> LutLinear:
        """All rows as one layer. The tensors of the layers become parts of its tensors where they can."""
        tensors = {}
        for name in dict(self._layers[0].named_buffers()):
            parts = [layer.get_buffer(name) for layer in self._layers]
            if name == "packed_codes":
                tensors[name] = torch.cat(parts, dim=1)
            elif name == "outlier_offsets":
                tensors[name] = _row_starts(torch.cat([part.diff() for part in parts]))
            else:
                tensors[name] = torch.cat(parts)
                for layer, part in zip(self._layers, tensors[name].split([len(part) for part in parts]), strict=True):
                    setattr(layer, name, part)
        bias = tensors.pop("bias", None)
        rows, outliers = (
            sum(getattr(layer.spec, name) for layer in self._layers) for name in ("out_features", "outliers")
        )
        return LutLinear(replace(self._layers[0].spec, out_features=rows, outliers=outliers), tensors, bias)


def fuse(layers: Sequence[LutLinear]) -> None:
    """Prepare layers that usually get the same input as one weight, and multiply single samples with it in one call.

    Nothing is stored twice: each layer keeps a view of its rows. Like everything that is prepared, the common weight
    does not follow tensors of the layers that are replaced by hand. Results are the same bit for bit on the CPU; on
    CUDA the order of sums may depend on the number of rows. Batches, tensors of the inference mode, inputs under
    autocast, and compiled code are multiplied layer by layer.

    Args:
        layers: none of them fused already. Those that are stored in different ways are not fused with each other.
    """
    alike: dict[ModuleSpec, list[LutLinear]] = {}
    for layer in layers:
        if layer.out_features % ALIGNED_ROWS == 0:
            kind = replace(layer.spec, out_features=1, outliers=min(layer.spec.outliers, 1))
            alike.setdefault(kind, []).append(layer)
    for group in alike.values():
        if len(group) > 1:
            FusedLayers(group)


def _is_autocast(x: Tensor) -> bool:
    """Whether autocast decides the type that a linear layer computes in."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return False
    return torch.is_autocast_enabled(kind)


def _state(x: Tensor) -> tuple[Any, ...]:
    """What must not differ between two calls that share their outputs."""
    if not x.is_cuda:
        return (x._version,)
    return x._version, torch.cuda.current_stream(x.device), torch.cuda.is_current_stream_capturing()


class _Multiplication(torch.autograd.Function):
    """`LutLinear.forward` with the derivative in x; the weight is a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: LutLinear) -> Tensor:
        ctx.layer = layer
        return layer._multiply(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantize().to(gradient.dtype), None


def _to_storage(name: str, values: Tensor) -> Tensor:
    stored = values.detach().to(CODEBOOK_DTYPE)
    if not all_finite(stored):
        raise NumericalError(
            f"{name} has a largest magnitude of {values.abs().max().item():g}; it is stored as float16, which ends "
            f"at {torch.finfo(CODEBOOK_DTYPE).max:g}: rescale the layer or exclude it"
        )
    return stored.contiguous()


def _compress_rows(outliers: Outliers, out_features: int) -> dict[str, Tensor]:
    per_row = torch.bincount(outliers.rows, minlength=out_features)
    return {
        "outlier_offsets": _row_starts(per_row),
        "outlier_columns": outliers.columns.to(torch.int32),
        "outlier_values": _to_storage("outlier values", outliers.values),
    }


def _row_starts(per_row: Tensor) -> Tensor:
    """Where the outliers of every row start, and where those of the last one end."""
    return torch.nn.functional.pad(per_row.cumsum(0), (1, 0)).to(torch.int32)

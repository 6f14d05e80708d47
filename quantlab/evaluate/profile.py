"""Generation as a user feels it: one sequence, token by token, beside the float model in the same run.

The models take turns, so that what disturbs the machine disturbs both, and ratios are taken turn by turn. Times are
wall times on a CPU, and on a CUDA device times between events of its stream. There each model takes one more turn at
the end, under the torch profiler, for the time of the kernels alone and the peak memory: the figures of GANQ's Table 5
(arXiv:2501.12956). What is for a CUDA device is not yet run on a GPU.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quantlab.calibration.tokens import load_tokenizer
from quantlab.evaluate.clock import Clock, KernelClock
from quantlab.evaluate.subject import Subject
from quantlab.memory import peak_rss_bytes
from quantlab.progress import Progress


@dataclass(frozen=True, kw_only=True)
class ProfileOptions:
    """What is generated, and how.

    Attributes:
        prompt: text to start from.
        new_tokens: tokens to generate.
        repeats: turns that each model takes.
        dtype: what the models compute in, or None for what they are stored in.
    """

    prompt: str = "import os\n"
    new_tokens: int = 1024
    repeats: int = 3
    dtype: str | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Turn:
    """One generation.

    Attributes:
        prefill_s: time until the first token.
        token_s: time of each further token.
        ids: (new_tokens,) what was generated.
    """

    prefill_s: float
    token_s: Sequence[float]
    ids: Tensor

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed, without the prefill."""
        return len(self.token_s) / sum(self.token_s)


def profile_subjects(subjects: Sequence[Subject], options: ProfileOptions, progress: Progress) -> dict[str, Any]:
    """Measure greedy generation.

    Args:
        subjects: what to measure, on one device; the first one is what the others are compared with.
        options: how much to generate, and how.
        progress: is told about every turn.

    Returns:
        "models" by name: "prefill_tokens_per_s" and "tokens_per_s" (medians over the turns), "ms_per_token"
        (percentiles 50, 90 and 99), "speedup" against the first model with its "speedup_range" over the turns,
        "weight_bytes" (tensors of the model), "bytes_on_disk", "load_s", the generated "text", and on a CUDA device
        "cuda_s" (kernels of one generation, prefill included) and "device_peak_bytes" (without the other models);
        beside them "new_tokens", "peak_rss_bytes" of the process with all models, "threads", "device", on a CUDA
        device its "device_name", and "torch".

    Raises:
        QuantlabError: a model cannot be loaded.
    """
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    models: dict[str, PreTrainedModel] = {}
    results: dict[str, dict[str, Any]] = {}
    for subject in subjects:
        started = time.perf_counter()
        models[subject.name] = subject.load(dtype)
        results[subject.name] = {
            "load_s": time.perf_counter() - started,
            "bytes_on_disk": subject.bytes_on_disk,
            "weight_bytes": _weight_bytes(models[subject.name]),
        }
    tokenizer = load_tokenizer(subjects[0].folder)
    prompt = torch.tensor(tokenizer(options.prompt)["input_ids"])
    for name, values in _take_turns(models, prompt, options, progress).items():
        text = str(tokenizer.decode(values.pop("ids")))
        results[name] |= {**values, "text": options.prompt + text}
    device = subjects[0].device
    return {
        "models": results,
        "new_tokens": options.new_tokens,
        "peak_rss_bytes": peak_rss_bytes(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        **({"device_name": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        "torch": torch.__version__,
    }


def _take_turns(
    models: Mapping[str, PreTrainedModel], prompt: Tensor, options: ProfileOptions, progress: Progress
) -> dict[str, dict[str, Any]]:
    turns: dict[str, list[Turn]] = {name: [] for name in models}
    on_device = {name: model for name, model in models.items() if model.device.type == "cuda"}
    occupied: dict[str, int] = {}
    progress.begin("generating", len(models) * (options.repeats + 1) + len(on_device), "turns")
    for name, model in models.items():
        occupied[name] = _warm_up(model, prompt)
        progress.advance()
    for _ in range(options.repeats):
        for name, model in models.items():
            turns[name].append(_generate(model, prompt, options.new_tokens))
            progress.advance(detail=f"{name}: {turns[name][-1].tokens_per_s:.1f} tokens/s")
    baseline = turns[next(iter(models))]
    results = {name: _summarize(turns[name], baseline, len(prompt)) for name in models}
    for name, model in on_device.items():
        results[name] |= _profile_kernels(model, prompt, options.new_tokens, occupied[name])
        progress.advance()
    return results


def _summarize(turns: Sequence[Turn], baseline: Sequence[Turn], prompt_tokens: int) -> dict[str, Any]:
    milliseconds = sorted(1000 * seconds for turn in turns for seconds in turn.token_s)
    speedups = [turn.tokens_per_s / other.tokens_per_s for turn, other in zip(turns, baseline, strict=True)]
    return {
        "prefill_tokens_per_s": prompt_tokens / statistics.median(turn.prefill_s for turn in turns),
        "tokens_per_s": statistics.median(turn.tokens_per_s for turn in turns),
        "ms_per_token": {str(rank): _percentile(milliseconds, rank) for rank in (50, 90, 99)},
        "speedup": statistics.median(speedups),
        "speedup_range": [min(speedups), max(speedups)],
        "ids": turns[0].ids.tolist(),
    }


def _percentile(ascending: Sequence[float], rank: int) -> float:
    return ascending[min(len(ascending) - 1, rank * len(ascending) // 100)]


def _weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of all distinct tensors of the model; tied weights count once."""
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())


def _warm_up(model: PreTrainedModel, prompt: Tensor) -> int:
    """Let the model prepare what it keeps; returns the bytes of its tensors and of what it prepared by CUDA."""
    weights, before = _weight_bytes(model), _cuda_bytes(model.device)
    _generate(model, prompt, 4)
    return weights + _cuda_bytes(model.device) - before


def _cuda_bytes(device: torch.device) -> int:
    """Bytes of all tensors on a CUDA device; 0 for any other."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _profile_kernels(model: PreTrainedModel, prompt: Tensor, new_tokens: int, occupied_bytes: int) -> dict[str, Any]:
    """One generation under the torch profiler; `occupied_bytes` of the CUDA memory are the model's before it."""
    others = _cuda_bytes(model.device) - occupied_bytes
    torch.cuda.reset_peak_memory_stats(model.device)
    ids = prompt[None].to(model.device)
    with KernelClock() as clock:
        _decode(model, ids, new_tokens, clock.tick)
    return {
        "cuda_s": clock.total_s,
        "device_peak_bytes": torch.cuda.max_memory_allocated(model.device) - others,
    }


def _generate(model: PreTrainedModel, prompt: Tensor, new_tokens: int) -> Turn:
    ids = prompt[None].to(model.device)
    clock = Clock(model.device)
    generated = _decode(model, ids, new_tokens, clock.tick)
    prefill, *tokens = clock.intervals_s()
    return Turn(prefill_s=prefill, token_s=tokens, ids=generated.cpu())


@torch.no_grad()  # like `generate`; fused layers need tensors that tell whether they have been changed
def _decode(model: PreTrainedModel, ids: Tensor, new_tokens: int, tick: Callable[[], None]) -> Tensor:
    """The tokens that follow `ids` (1, tokens), (new_tokens,); `tick` is called after each."""
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    chosen = [output.logits[:, -1:].argmax(dim=-1)]
    tick()
    for _ in range(new_tokens - 1):
        output = model(input_ids=chosen[-1], past_key_values=output.past_key_values, use_cache=True)
        chosen.append(output.logits[:, -1:].argmax(dim=-1))
        tick()
    return torch.cat(chosen, dim=1)[0]

"""Float models by name: an alias, a local folder or a hub id, resolved to a folder that can be quantized."""

import json
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantlab.errors import ModelError, did_you_mean
from quantlab.known_configs import KNOWN_CONFIGS

if typing.TYPE_CHECKING:
    from transformers import PretrainedConfig

DEMO = "demo"

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
_CONVERSION = (
    'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
    "[c.from_pretrained('{name}').save_pretrained('converted') for c in (M, T)]\""
)
# Weights, configuration and tokenizer at the top of a repository: no copies in other formats or in subfolders.
_DOWNLOADED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_NOT_DOWNLOADED = ["*/*", "consolidated*"]


@dataclass(frozen=True)
class ModelAlias:
    """A short name for a model.

    Attributes:
        hub_id: repository on the Hugging Face hub; empty for the bundled model.
        note: one line for tables.
    """

    hub_id: str
    note: str


ALIASES = {
    DEMO: ModelAlias("", "bundled tiny Llama trained on Python sources; needs no network"),
    "opt-125m": ModelAlias("facebook/opt-125m", "OPT, the smallest of the papers' models"),
    "opt-350m": ModelAlias("facebook/opt-350m", "OPT"),
    "opt-1.3b": ModelAlias("facebook/opt-1.3b", "OPT"),
    "opt-2.7b": ModelAlias("facebook/opt-2.7b", "OPT"),
    "opt-6.7b": ModelAlias("facebook/opt-6.7b", "OPT"),
    "gpt2": ModelAlias("openai-community/gpt2", "124 M parameters"),
    "qwen3-0.6b": ModelAlias("Qwen/Qwen3-0.6B", "small and recent, open license"),
    "qwen3-1.7b": ModelAlias("Qwen/Qwen3-1.7B", "open license"),
    "qwen3-8b": ModelAlias("Qwen/Qwen3-8B", "open license"),
    "gemma-3-270m": ModelAlias("google/gemma-3-270m", "gated: accept the license on the hub"),
    "llama-3.2-1b": ModelAlias("meta-llama/Llama-3.2-1B", "gated: accept the license on the hub"),
    "llama-3.2-3b": ModelAlias("meta-llama/Llama-3.2-3B", "gated: accept the license on the hub"),
    "llama-3-8b": ModelAlias("meta-llama/Meta-Llama-3-8B", "gated: accept the license on the hub"),
    "llama-7b": ModelAlias("huggyllama/llama-7b", "LLaMA 1, in the papers' tables"),
    "llama-13b": ModelAlias("huggyllama/llama-13b", "LLaMA 1, in the papers' tables"),
    "llama-2-7b": ModelAlias("meta-llama/Llama-2-7b-hf", "in the papers' tables; gated"),
    "llama-2-13b": ModelAlias("meta-llama/Llama-2-13b-hf", "in the papers' tables; gated"),
}


def resolve_model(name: str) -> Path:
    """The local folder of a float model, downloaded if it has to be.

    Args:
        name: an alias, a local folder or a hub id, tried in this order; `./gpt2` is always a folder.

    Raises:
        ModelError: nothing is there, it cannot be downloaded, or it cannot be quantized.
    """
    folder = _find(name)
    _require_float_decoder(folder, name)
    _require_safetensors(folder, name)
    return folder


def resolve_config(name: str) -> "PretrainedConfig":
    """The configuration of a float model; its weights need not be on this machine.

    Args:
        name: as for `resolve_model`. Of an alias the known dimensions
            are used, without asking the hub.

    Raises:
        ModelError: nothing is known about the model here.
    """
    from transformers import AutoConfig  # takes seconds to import, and the names of models need it never

    from quantlab.skeleton import read_config

    if name in KNOWN_CONFIGS and not Path(name).is_dir():
        dimensions = dict(KNOWN_CONFIGS[name])
        return AutoConfig.for_model(dimensions.pop("model_type"), **dimensions)
    return read_config(resolve_model(name))


def model_label(name: str) -> str:
    """A short name for folders and tables: the last part of a path or hub id."""
    return name if name in ALIASES else Path(name).expanduser().resolve().name


def _find(name: str) -> Path:
    if name == DEMO:
        return Path(__file__).parent / "demo" / "model"
    folder = Path(name).expanduser()
    if name not in ALIASES and folder.is_dir():
        return folder
    hub_id = ALIASES[name].hub_id if name in ALIASES else name
    if _HUB_ID.fullmatch(hub_id) and not name.startswith("."):
        return _download(hub_id)
    if folder.is_file():
        raise ModelError(f"model {name} is a file; give the folder that holds config.json and the weights")
    hint = did_you_mean(name, ALIASES)
    raise ModelError(
        f"no model {name}: not a folder, not a hub id (owner/name), not an alias{hint} "
        "(`quantlab ls models` lists the aliases)"
    )


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # takes half a second to import, and local models need it never
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_DOWNLOADED, ignore_patterns=_NOT_DOWNLOADED))
    except GatedRepoError as error:
        why = f"it is gated; accept its license at https://huggingface.co/{hub_id} and log in with `hf auth login`"
        raise _download_error(hub_id, why) from error
    except RepositoryNotFoundError as error:
        why = (
            "the hub has no such public repository; check the spelling, or log in with `hf auth login` if it is private"
        )
        raise _download_error(hub_id, why) from error
    except LocalEntryNotFoundError as error:
        raise _download_error(hub_id, "the hub cannot be reached and the model is not in the local cache") from error
    except (OSError, ValueError) as error:  # HTTP and disk errors; malformed ids
        raise _download_error(hub_id, f"{type(error).__name__}: {error}") from error


def _download_error(hub_id: str, why: str) -> ModelError:
    folder = hub_id.split("/")[-1]
    return ModelError(
        f"cannot get the model {hub_id}: {why}\n"
        f"  Or bring it by hand: on a machine with network, run `hf download {hub_id} --local-dir {folder}`,\n"
        f"  copy the folder here and use --model path/to/{folder}; `--model {DEMO}` works without any download"
    )


def _require_float_decoder(folder: Path, name: str) -> None:
    config = _read_json(folder / "config.json", name)
    if "quantization_config" in config:
        method = config["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        raise ModelError(f"model {name} is quantized already (quant_method {method}); start from the float model")
    if config.get("is_encoder_decoder"):
        raise ModelError(f"model {name} is an encoder-decoder ({config.get('model_type')}); use a decoder-only model")


def _require_safetensors(folder: Path, name: str) -> None:
    if (folder / "model.safetensors").is_file():
        return
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _read_json(index, name).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"model {name}: {index} has no weight_map; download the model again")
        missing = sorted({shard for shard in weight_map.values() if not (folder / str(shard)).is_file()})
        if missing:
            raise ModelError(
                f"model {name}: {len(missing)} of the weight files that {index.name} lists are missing in {folder}, "
                f"the first is {missing[0]}; finish the download"
            )
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    found = f" but {', '.join(pickles[:3])}" if pickles else ""
    raise ModelError(
        f"model {name} has no model.safetensors{found}; pickled weights (.bin, .pt) are not read, since they can run "
        f"code. If you trust them, convert them and use --model converted:\n  {_CONVERSION.format(name=name)}"
    )


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"model {name}: {path.parent} has no {path.name}; give the folder that holds it and the weights"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"model {name}: cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"model {name}: {path} must hold a JSON object, not a {type(content).__name__}")
    return content

"""Folders of finished runs, as the page reads them."""

import json
import re
import shutil
import subprocess

import pytest
import torch
from safetensors import safe_open

from quantlab.api import CodebookSpec
from quantlab.checkpoint.format import QuantizationConfig
from quantlab.checkpoint.writer import CheckpointWriter
from quantlab.models import resolve_model
from quantlab.runtime import LutLinear
from quantlab.solvers.grid import round_to_nearest

LAYERS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
SCRIPT = "<script>document.title='broken'</script>"


def layer(name, loss=0.01, baseline=0.04, tokens=512, diagnostics=None):
    return {
        "name": name,
        "shape": [192, 192],
        "bits": 4,
        "group_size": None,
        "relative_loss": loss,
        "rtn_relative_loss": baseline,
        "num_tokens": tokens,
        "diagnostics": diagnostics or {},
    }


def manifest(**changes):
    return {
        "model": {"path": "demo", "architecture": "Llama", "parameters": 2_000_000, "quantized_parameters": 1_900_000},
        "method": {"name": "ganq", "options": {"iterations": 10}, "distribution": "quantlab-ptq", "version": "0.1.0"},
        "bits": 4,
        "group_size": None,
        "bits_per_weight": 4.25,
        "checkpoint_bytes": 1_250_000,
        "source_bytes": 4_030_000,
        "peak_rss_bytes": 812_000_000,
        "wall_s": 75.0,
        "stages_s": {"read_text": 1.0, "quantize": 12.0, "evaluate": 62.0},
        "engine_s": {"forward": 5.0, "solve": 6.5},
        "memory": {
            "budget_bytes": 900_000_000,
            "expected_peak_bytes": 700_000_000,
            "quantize_peak_rss_bytes": 650_000_000,
            "parts": {"runtime": 500_000_000, "weights": 200_000_000},
            "timeline": {
                "interval_s": 5.0,
                "bytes": [300_000_000, 640_000_000, 650_000_000, *[812_000_000] * 12],
                "stages": {"read_text": 0.0, "quantize": 1.0, "evaluate": 13.0},
            },
        },
        "layers": [layer(f"model.layers.{block}.{name}", 0.01 + 0.01 * block) for block in (0, 1) for name in LAYERS],
        "fallbacks": [],
        "calibration": {"name": "stdlib", "num_samples": 8, "sequence_length": 64, "token_sha256": "ab" * 32},
        "seed": 0,
        "versions": {"torch": "2.13.0"},
        "command": "quantlab run ganq_w4",
        "files": {"quantlab-rest.safetensors": "cd" * 32},
        **changes,
    }


def evaluation(quantized=10.5, kl=0.05, text="stdlib", **changes):
    values = {
        "float": 10.0,
        "quantized": quantized,
        "kl": kl,
        "kl_standard_error": 0.001,
        "top1_agreement": 0.9,
        "windows": 4,
        "sequence_length": 64,
        "token_sha256": "cd",
        **changes,
    }
    return {"perplexity": {text: values}}


def write_run(folder, content=None, scores=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(content or manifest()))
    (folder / "eval.json").write_text(json.dumps(evaluation() if scores is None else scores))
    return folder


def write_checkpoint(run_folder, layers):
    """The demo model's layers, rounded to nearest at 3 bits."""
    writer, modules = CheckpointWriter(run_folder / "model"), {}
    with safe_open(resolve_model("demo") / "model.safetensors", framework="pt") as file:
        for name in layers:
            spec = CodebookSpec(bits=3, group_size=None)
            module = LutLinear.from_layer(round_to_nearest(file.get_tensor(f"{name}.weight").float(), spec), spec, None)
            modules[name] = module.spec
            writer.add_shard(f"part-{len(modules)}", {f"{name}.{key}": t for key, t in module.state_dict().items()})
    method, producer = {"name": "rtn", "options": {}}, {"name": "quantlab-ptq", "version": "0"}
    config = QuantizationConfig(method=method, producer=producer, modules=modules)
    writer.finish(None, json.loads((resolve_model("demo") / "config.json").read_text()), config)
    return run_folder


@pytest.fixture
def run_folder(tmp_path):
    """A finished run of the demo model with two layers in its checkpoint."""
    torch.manual_seed(0)
    names = [f"model.layers.1.{name}" for name in LAYERS[:2]]
    return write_checkpoint(write_run(tmp_path / "run"), names)


@pytest.fixture
def comparison(tmp_path):
    """Three cells that are finished and one that failed."""
    cells = tmp_path / "comparison" / "cells"
    for name, size, kl in (("ganq", 1_250_000, 0.05), ("gptq", 1_200_000, 0.09), ("rtn", 1_200_000, 0.3)):
        method = {"name": name, "options": {}, "distribution": "quantlab-ptq", "version": "0.1.0"}
        scores = evaluation(10 + 10 * kl, kl)
        write_run(cells / f"{name}-w4-s0", manifest(method=method, checkpoint_bytes=size), scores)
    (cells / "lnq-w4-s0.failed.json").write_text(json.dumps({"reason": "no factor"}))
    return cells.parent


@pytest.fixture
def hostile_run(tmp_path):
    """A run with a script in every text that is not written by quantlab."""
    text = f"\"'>{SCRIPT}$\\frac$\x00\x1b]\u202e\ud800]]>&<!--"
    names = [f"model.layers.0.{text}.q_proj", f"model.layers.1.experts.0.{text}", text]
    scores = evaluation(text=text)
    scores["perplexity"][text]["token_sha256"] = text
    content = manifest(
        model={"path": text, "architecture": text, "parameters": 1000, "quantized_parameters": 900},
        method={"name": text, "options": {text: text}, "distribution": text, "version": text},
        stages_s={text: 1.0, "quantize": 2.0},
        engine_s={text: 1.0},
        layers=[layer(name, diagnostics={"loss_0": 2.0, "loss_1": 1.0, text: 0.0}) for name in names],
        fallbacks=[text],
        calibration={"name": text, "num_samples": 8, "sequence_length": 64, "token_sha256": text},
        seed=text,
        versions={text: text},
        command=f"quantlab run {text}",
        files={text: text},
    )
    content["memory"]["parts"] = {text: 5}
    content["memory"]["timeline"]["stages"] = {text: 0.0}
    return write_run(tmp_path / "hostile", content, scores)


@pytest.fixture(scope="session")
def chromium():
    """Opens a page with more script at its end; gives the DOM afterwards and what the console said."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium on this machine")

    def open_page(path, script="", width=1440):
        text = path.read_text(encoding="utf-8")
        copy = path.with_name("opened.html")
        if script:
            text = re.sub(r"script-src &#x27;.*?&#x27;", "script-src &#x27;unsafe-inline&#x27;", text)
            text = text.replace("</body>", f"<script>{script}</script></body>")
        copy.write_text(text, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--enable-logging=stderr"]
        command = [program, *flags, f"--window-size={width},900", copy.as_uri()]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]

    return open_page

"""A Ray cluster of three nodes on this machine, and a tiny model that every node can read."""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

TEXT = "def area(radius):\n    return 3.14159 * radius ** 2  # of a circle\n\n" * 40
NODE = {"num_cpus": 1, "object_store_memory": 120 * 2**20}


def start_cluster(nodes):
    """A cluster of this many nodes, the head among them; the caller shuts it down."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'quantlab-ptq[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    here = str(Path(__file__).parent)  # where the nodes find `remote`
    os.environ["PYTHONPATH"] = os.pathsep.join({here: None, **dict.fromkeys(sys.path)})
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    for _ in range(nodes - 1):
        cluster.add_node(**NODE)
    return cluster


@pytest.fixture(scope="session")
def cluster():
    started = start_cluster(3)
    yield started
    started.shutdown()


@pytest.fixture
def own_cluster():
    """A function that starts a cluster which the test may damage."""
    started = []

    def start(nodes):
        started.append(start_cluster(nodes))
        return started[-1]

    yield start
    for each in started:
        each.shutdown()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder with a model of three blocks, and texts to calibrate on and to evaluate on."""
    folder = tmp_path_factory.mktemp("tiny")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<end>"], show_progress=False)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<end>").save_pretrained(folder / "model")
    (folder / "train.txt").write_text(TEXT)
    (folder / "test.txt").write_text(TEXT[:2000])
    return folder


@pytest.fixture(scope="session")
def on_tiny(tiny):
    """Arguments that set a command up for the tiny model; a single thread makes room for several tasks."""
    return [
        *("--model", str(tiny / "model"), "--calibration", f"file:{tiny / 'train.txt'}", "--num-samples", "4"),
        *("--sequence-length", "16", "--perplexity", f"file:{tiny / 'test.txt'}", "--num-windows", "2"),
        *("--set", "engine.deterministic=true"),
    ]


def command(*arguments):
    return [sys.executable, "-m", "quantlab", *map(str, arguments)]


def file_hashes(run_folder):
    """Of the checkpoint in a run folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (run_folder / "model").iterdir()}


def cells(folder):
    """By cell: hashes of the checkpoint, and what was measured."""
    found = {}
    for manifest in sorted((folder / "cells").glob("*/manifest.json")):
        found[manifest.parent.name] = (
            file_hashes(manifest.parent),
            json.loads((manifest.parent / "eval.json").read_text())["perplexity"],
        )
    return found


def wait_for(condition, process=None, seconds=60):
    """Wait until something is so, while a process is running."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        assert process is None or process.poll() is None, "the process ended too early"
        time.sleep(0.05)


def processes_with(text):
    """Process ids whose command line or environment contains a text."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                content = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
            except OSError:
                continue
            if text.encode() in content:
                found.append(int(entry.name))
    return found

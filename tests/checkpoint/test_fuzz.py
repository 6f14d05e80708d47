"""Random damage to every file that is read back: the answer is a model or a typed error, never anything else.

The default set runs a few hundred cases, the slow set thousands.
"""

import copy
import json
import random
import shutil
import struct
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantlab.checkpoint.contents import read_contents
from quantlab.checkpoint.format import QuantizationConfig
from quantlab.checkpoint.inspect import inspect
from quantlab.checkpoint.reader import load
from quantlab.checkpoint.verify import verify
from quantlab.errors import QuantlabError
from quantlab.recipe import builtin_recipes, load_recipe

FIXTURE = Path(__file__).parent / "fixtures" / "format-2" / "model"
FILES = sorted(path.name for path in FIXTURE.iterdir())
VALUES = [
    None, True, 0, -1, 1, 2**31, 10**30, 1.5, "", "..", "../x", "/etc/passwd", "\u0000", [], {}, [[]], {"a": 1}, "x" * 9
]  # fmt: skip
CASES = [pytest.param(60, id="some"), pytest.param(1100, id="many", marks=pytest.mark.slow)]


def allowed(work):
    """Whether it worked; anything but a typed error fails the test."""
    try:
        work()
    except QuantlabError:
        return False
    return True


def paths_in(value, path=()):
    """The place of every value inside a JSON document."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from paths_in(child, (*path, key))


def mutate_document(content, dice):
    """One to three values replaced, removed, doubled or moved."""
    for _ in range(dice.randint(1, 3)):
        place = dice.choice([path for path in paths_in(content) if path])
        inner = content
        for key in place[:-1]:
            inner = inner[key]
        action = dice.choice(["replace", "replace", "remove", "copy"])
        if action == "remove":
            del inner[place[-1]]
        else:
            source = [inner[key] for key in (inner if isinstance(inner, dict) else range(len(inner)))]
            inner[place[-1]] = copy.deepcopy(dice.choice(VALUES if action == "replace" else source))
        if not content:
            break
    return content


def mutate_bytes(content, dice):
    """Bits flipped, a piece cut out, repeated or replaced by noise."""
    content = bytearray(content)
    start = dice.randrange(len(content))
    end = min(len(content), start + dice.choice([1, 1, 2, 8, 100]))
    action = dice.choice(["flip", "cut", "repeat", "noise", "truncate"])
    if action == "flip":
        content[start] ^= 1 << dice.randrange(8)
    elif action == "cut":
        del content[start:end]
    elif action == "repeat":
        content[start:start] = content[start:end]
    elif action == "noise":
        content[start:end] = dice.randbytes(end - start)
    else:
        del content[start:]
    return bytes(content)


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FIXTURE, tmp_path / "inside" / "model")


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("file", ["config.json", "quantlab.safetensors.index.json"])
def test_documents_with_other_values_are_read_or_refused(folder, file, cases):
    dice, original = random.Random(f"{file}{cases}"), json.loads((FIXTURE / file).read_text())
    refusals = 0
    for _ in range(cases):
        (folder / file).write_text(json.dumps(mutate_document(json.loads(json.dumps(original)), dice)))
        refusals += not allowed(lambda: load(folder))
    assert refusals > cases / 3


@pytest.mark.parametrize("cases", CASES)
def test_headers_with_other_values_are_read_or_refused(folder, cases):
    dice, shard = random.Random(cases), "quantlab-block-00000.safetensors"
    content = (FIXTURE / shard).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    original = json.loads(content[8 : 8 + length])
    refusals = 0
    for _ in range(cases):
        header = json.dumps(mutate_document(json.loads(json.dumps(original)), dice)).encode()
        (folder / shard).write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
        refusals += not allowed(lambda: load(folder))
    assert refusals > cases / 2


@pytest.mark.parametrize("cases", CASES)
def test_files_with_damaged_bytes_are_read_or_refused(folder, cases):
    dice = random.Random(cases)
    before = sorted(folder.parent.parent.rglob("*"))
    for _ in range(cases):
        file = dice.choice(FILES)
        (folder / file).write_bytes(mutate_bytes((FIXTURE / file).read_bytes(), dice))
        allowed(lambda: load(folder))
        assert not file.startswith("quantlab-") or not allowed(lambda: verify(folder)), "the hashes must notice"
        shutil.copy(FIXTURE / file, folder / file)
    assert sorted(folder.parent.parent.rglob("*")) == before


@pytest.mark.parametrize("cases", CASES)
def test_manifests_with_other_values_are_read_or_refused(folder, cases):
    dice = random.Random(cases)
    name = "model.layers.0.self_attn.q_proj"
    original = {"files": {"config.json": "0" * 64}, "layers": [{"name": name, "relative_loss": 0.5, "bits": 4}]}
    for _ in range(cases):
        manifest = mutate_document(json.loads(json.dumps(original)), dice)
        (folder.parent / "manifest.json").write_text(json.dumps(manifest))
        allowed(lambda: inspect(folder.parent))
        assert not allowed(lambda: verify(folder.parent)) or "files" not in manifest or not manifest["files"]


@pytest.mark.parametrize("cases", CASES)
def test_recipes_with_other_values_are_read_or_refused(tmp_path, cases):
    dice = random.Random(cases)
    path = tmp_path / "recipe.yaml"
    texts = [recipe.read_text() for recipe in builtin_recipes().values()]
    for case in range(cases):
        text = dice.choice(texts)
        if case % 2:
            path.write_bytes(mutate_bytes(text.encode(), dice))
        else:
            path.write_text(yaml.safe_dump(mutate_document(yaml.safe_load(text), dice)))
        allowed(lambda: load_recipe(path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=10,
)
SECTION = json.loads((FIXTURE / "config.json").read_text())["quantization_config"]
SECTIONS = JSON | st.fixed_dictionaries({key: st.just(value) | JSON for key, value in SECTION.items()})


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(section=SECTIONS)
def test_any_section_is_parsed_or_refused(section):
    allowed(lambda: QuantizationConfig.from_dict(section))


@settings(max_examples=50, deadline=None, derandomize=True, database=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])  # fmt: skip
@given(config=JSON, index=JSON, shard=st.binary(max_size=200))
def test_any_files_are_read_or_refused(folder, config, index, shard):
    for name, content in (("config.json", config), ("quantlab.safetensors.index.json", index)):
        (folder / name).write_text(json.dumps(content))
    (folder / "quantlab-rest.safetensors").write_bytes(shard)
    assert not allowed(lambda: read_contents(folder))

import json
from collections import namedtuple
from importlib import metadata

import pytest

from quantlab import doctor, registry
from quantlab.cli.app import invoke
from quantlab.doctor import Finding
from quantlab.errors import PluginError


@pytest.fixture
def sound(monkeypatch):
    """Spares the compilation of kernels and the import of every method; the rest is as on this machine."""
    monkeypatch.setattr(doctor, "kernel_states", lambda: {"lut_matmul": "lut-avx2", "cuda": "none"})
    monkeypatch.setattr(registry, "claimed", lambda: ["rtn"])


def examined(capsys):
    code = invoke(["doctor", "--json"])
    return code, {(row["topic"], row["name"]): row for row in json.loads(capsys.readouterr().out)}


def test_a_sound_installation_exits_0_and_shows_every_topic(sound, capsys):
    assert invoke(["doctor"]) == 0
    output = capsys.readouterr().out
    for topic in ("versions", "name", "machine", "disk", "methods", "kernels"):
        assert f"{topic}\n" in output
    assert "broken" not in output


def test_the_same_findings_are_printed_as_json(sound, capsys):
    code, findings = examined(capsys)
    assert code == 0
    assert findings["versions", "torch"]["value"] == metadata.version("torch")
    assert findings["kernels", "lut_matmul"] == {
        "topic": "kernels",
        "name": "lut_matmul",
        "value": "lut-avx2",
        "level": "ok",
        "remedy": "",
    }


def test_another_distribution_that_installs_our_package_is_found(sound, monkeypatch, capsys):
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"quantlab": ["quantlab", "Quantlab_PTQ"]})
    code, findings = examined(capsys)
    assert code == 78
    clash = findings["name", "import quantlab"]
    assert clash["level"] == "broken"
    assert "but quantlab installs a package quantlab, too" in clash["value"]
    assert clash["remedy"].startswith("pip uninstall quantlab && ")


@pytest.mark.parametrize(
    ("requirement", "value"),
    [("rich<1", "but <1 is needed"), ("no-such-distribution>=2", "not installed")],
)
def test_a_missing_or_wrong_version_is_broken(sound, monkeypatch, capsys, requirement, value):
    own = namedtuple("Own", "version requires")("1.0", [requirement, 'pytest<1; extra == "dev"'])
    find = metadata.distribution
    monkeypatch.setattr(metadata, "distribution", lambda name: own if name == doctor.DISTRIBUTION else find(name))
    code, findings = examined(capsys)
    assert code == 78
    broken = [row for row in findings.values() if row["level"] == "broken"]
    assert [value in row["value"] for row in broken] == [True]
    assert broken[0]["remedy"] == f'pip install "{requirement}"'


def test_a_broken_method_is_named_with_its_reason(sound, monkeypatch, capsys):
    def fail(name):
        raise PluginError(f"method {name} cannot be imported")

    monkeypatch.setattr(registry, "load", fail)
    assert invoke(["doctor"]) == 78
    captured = capsys.readouterr()
    assert "method rtn cannot be imported" in captured.out
    assert "the other methods work" in captured.out
    assert "error: broken: rtn" in captured.err


def test_kernels_that_fall_back_are_a_warning(sound, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "kernel_states", lambda: {"solver": "reference: no compiler"})
    code, findings = examined(capsys)
    assert code == 0
    assert findings["kernels", "solver"]["level"] == "warning"


def test_a_full_disk_is_a_warning(sound, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "free")(5_000_000))
    code, findings = examined(capsys)
    assert code == 0
    assert findings["disk", "here"]["level"] == "warning"
    assert "5 MB free" in findings["disk", "here"]["value"]


def test_what_cannot_be_found_out_is_a_finding_itself(monkeypatch):
    def fail():
        raise OSError("libtorch.so: cannot open shared object file")

    for topic in ("_versions", "_name", "_machine", "_disk", "_methods", "_kernels"):
        monkeypatch.setattr(doctor, topic, fail if topic == "_machine" else lambda: iter(()))
    [finding] = doctor.examine()
    assert (finding.topic, finding.level) == ("machine", "broken")
    assert "libtorch.so" in finding.value


def test_a_kernel_that_cannot_be_had_is_a_state_and_not_a_warning(monkeypatch):
    monkeypatch.setenv("QUANTLAB_KERNELS", "reference")
    states = doctor.kernel_states()
    assert states["solver"] == states["lut_matmul"] == "reference: QUANTLAB_KERNELS=reference"


def test_kernels_are_listed(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "kernel_states", lambda: {"solver": "solver-avx2"})
    assert invoke(["ls", "kernels"]) == 0
    assert capsys.readouterr().out == "solver  solver-avx2\n"


def test_topics_are_printed_once(monkeypatch, capsys):
    findings = [Finding(topic="disk", name=name, value="much") for name in ("here", "there")]
    monkeypatch.setattr(doctor, "examine", lambda: findings)
    assert invoke(["doctor"]) == 0
    assert capsys.readouterr().out.count("disk") == 1

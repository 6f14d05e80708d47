"""The reference executor, and how an executor is chosen."""

import importlib.util
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from quantlab.cli.app import invoke
from quantlab.errors import NumericalError, UsageError
from quantlab.executors import ExecutorOptions, LocalExecutor, open_executor, opening
from quantlab.executors.nodes import NodeReport, report_node, require_alike
from quantlab.executors.unit import Failure, Settings, run_unit
from quantlab.progress import NoProgress


def test_units_run_when_their_result_is_asked_for_in_order():
    ran = []

    def unit(number, shared):
        ran.append(number)
        return number * shared

    executor, arrived = LocalExecutor(), []
    results = executor.map(unit, ((number, executor.put(10)) for number in range(3)), arrived=arrived.append)
    assert ran == []
    assert next(results) == 0
    assert ran == [0]
    assert list(results) == [10, 20]
    assert arrived == [0, 1, 2]


def test_a_call_is_made_once_and_only_if_its_value_is_needed():
    made = []
    executor = LocalExecutor()
    handle = executor.call(lambda value: made.append(value) or value + 1, executor.put(1))
    assert made == []
    assert list(executor.map(lambda *values: values, [(handle, 5), (handle, 6)])) == [(2, 5), (2, 6)]
    assert made == [1]


def test_a_local_link_passes_on():
    progress, stop = NoProgress(), iter([False, True])
    link = LocalExecutor().link(progress, lambda: next(stop))
    with link.reporting("unit") as reported:
        assert reported is progress
    assert (link.stop(), link.stop()) == (False, True)


def test_a_unit_computes_under_the_settings_of_the_driver(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUANTLAB_KERNELS", "reference")
    threads = torch.get_num_threads()
    with torch.no_grad():
        settings = Settings.current()
    try:
        different = Settings(threads=threads + 1, gradients=True, kernels=None, folder="/")
        assert run_unit(different, Settings.current) == different
        assert run_unit(settings, Settings.current) == settings
    finally:
        torch.set_num_threads(threads)


def fail(value):
    raise NumericalError(f"no {value}")


def test_a_unit_that_fails_brings_its_error_back_and_so_do_units_that_build_on_it():
    settings = Settings.current()
    failure = run_unit(settings, fail, 3)
    assert isinstance(failure, Failure)
    assert isinstance(failure.error, NumericalError)
    assert str(failure.error) == "no 3"
    assert "in fail" in failure.error.__dict__["remote_traceback"]
    assert run_unit(settings, fail, failure) is failure


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--address", "10.0.0.1:6379"], "--address is for --executor ray"),
        (["--cpus-per-task", "2"], "--cpus-per-task is for --executor ray"),
        (["--executor", "ray", "--address", "10.0.0.1:6379", "--spill-dir", "/tmp"], "give it to `ray start`"),
        (["--executor", "ray", "--object-store", "4GB"], "must be a number with one of the units"),
        (["--executor", "dask"], "'dask' is not one of 'local', 'ray'"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, capsys, arguments, message):
    assert invoke(["compare", "rtn", "--output-dir", str(tmp_path / "out"), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_without_ray_the_command_to_install_it_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(opening, "find_spec", lambda name: None if name == "ray" else importlib.util.find_spec(name))
    assert invoke(["compare", "rtn", "--output-dir", str(tmp_path / "out"), "--executor", "ray"]) == 2
    assert "pip install 'quantlab-ptq[ray]'" in capsys.readouterr().err


def test_solving_on_a_gpu_needs_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="no CUDA device"), open_executor(ExecutorOptions(gpus_per_task=1)):
        pass


@pytest.fixture
def report(tiny, tmp_path):
    probe = tmp_path / "probe"
    probe.write_text("seen")
    return report_node(tiny / "model", probe)


def test_a_machine_that_is_alike_may_take_part(report, tiny):
    require_alike(report, replace(report, host="other"), "10.0.0.2", tiny / "model", Path("out"))


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ({"model": None}, r"node gpu7 \(10.0.0.2\) cannot take part: it\n  cannot read the model folder .*model; put"),
        ({"model": "abc"}, "has other files in the model folder"),
        ({"probe": None}, "does not see the run folder out; choose an --output-dir on storage that all nodes share"),
        ({"torch": "2.1"}, "has torch 2.1, but .* is where the command runs; install the same version"),
        ({"python": "3.11.1"}, "has python 3.11.1"),
    ],
)
def test_a_machine_with_other_files_or_programs_is_refused_by_name(report, tiny, difference, message):
    node: NodeReport = replace(report, host="gpu7", **difference)
    with pytest.raises(UsageError, match=message):
        require_alike(report, node, "10.0.0.2", tiny / "model", Path("out"))


def test_a_machine_with_another_processor_takes_part_with_a_warning(report, tiny):
    node = replace(report, host="old", processor="AVX2" if report.processor != "AVX2" else "DEFAULT")
    with pytest.warns(UserWarning, match="node old .* has processor .* cannot be repeated bit for bit"):
        require_alike(report, node, "10.0.0.2", tiny / "model", Path("out"))


def test_the_model_is_looked_at_without_reading_it(report, tmp_path):
    assert report.model is not None
    assert report_node(tmp_path / "nowhere", tmp_path / "probe").model is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (tmp_path / "empty").mkdir()
        assert report_node(tmp_path / "empty", tmp_path / "probe").model is None

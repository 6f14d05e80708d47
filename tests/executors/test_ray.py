"""What Ray adds: other processes, other machines, and the loss of both."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("ray", reason="Ray is not installed: pip install 'quantlab-ptq[ray]'")

from quantlab.errors import NumericalError, ResumableError, UsageError
from quantlab.executors import ExecutorOptions, LocalExecutor, Resources, open_executor

sys.path.append(str(Path(__file__).parent))
import remote


class Listener:
    def __init__(self):
        self.details = []

    def begin(self, stage, total, unit):
        pass

    def advance(self, count=1, detail=""):
        self.details.append(detail)


@pytest.fixture(scope="module")
def executor(cluster):
    options = ExecutorOptions(name="ray", address=cluster.address, cpus_per_task=1)
    with open_executor(options) as opened:
        yield opened


def test_units_run_elsewhere_with_the_threads_and_the_folder_of_the_driver(executor):
    assert executor.remote
    assert executor.slots == 3
    arrived = []
    results = list(executor.map(remote.where, [(number,) for number in range(6)], arrived=arrived.append))
    assert [number for number, *_ in results] == list(range(6))
    assert os.getpid() not in {process for _, process, *_ in results}
    assert {rest for _, _, *rest in map(tuple, results) for rest in [tuple(rest)]} == {
        (torch.get_num_threads(), os.getcwd())
    }
    assert sorted(arrived) == list(range(6))


def test_handles_stand_for_their_values(executor):
    total = executor.call(remote.add, executor.put(1), 2)
    assert list(executor.map(remote.add, [(total, 10), (total, executor.call(remote.add, total, 1))])) == [13, 7]


def test_tensors_arrive_with_their_strides_and_are_computed_with_alike(executor):
    matrix = torch.randn(257, 130, generator=torch.Generator().manual_seed(0)).T
    here = next(LocalExecutor().map(remote.transposed, [(matrix,)]))
    there = next(executor.map(remote.transposed, [(executor.put(matrix),)]))
    assert there[1:] == here[1:]
    assert torch.equal(there[0], here[0])


def test_an_error_of_a_unit_is_raised_at_its_turn(executor):
    results = executor.map(remote.fail, [(0,), (1,), (2,)])
    assert next(results) == 0
    with pytest.raises(NumericalError, match="unit 1 has no answer"):
        next(results)


def test_a_model_that_only_a_node_cannot_read_does_not_end_the_run_for_good(executor):
    with pytest.raises(ResumableError, match="on a node of the cluster: /models is missing"):
        next(executor.map(remote.miss, [("/models",)]))


def test_an_error_passes_through_the_units_that_build_on_it(executor):
    with pytest.raises(NumericalError, match="unit 1 has no answer"):
        next(executor.map(remote.add, [(executor.call(remote.fail, 1), 1)]))


def test_a_unit_whose_process_dies_runs_again(executor, tmp_path):
    assert list(executor.map(remote.die_once, [(str(tmp_path / "died"),)])) == ["again"]


def test_sticky_units_come_back_to_their_process(executor):
    first = list(executor.map(remote.remember, [(0,), (1,)], sticky=True))
    second = list(executor.map(remote.remember, [(2,), (3,)], sticky=True))
    assert [kept for kept, _ in second] == [[0, 2], [1, 3]]
    assert [process for _, process in second] == [process for _, process in first]


def test_progress_and_warnings_of_units_reach_the_listener(executor):
    listener = Listener()
    link = executor.link(listener, lambda: False)
    assert list(executor.map(remote.tell, [(link, "cell")])) == [False]
    list(executor.map(remote.where, [(0,)]))  # messages are on their way when a unit is done
    for _ in range(50):
        if len(listener.details) >= 3:
            break
        list(executor.map(remote.where, [(0,)]))
    assert listener.details == [
        "cell: counting: 2 sheep",
        "cell: counting 1/2 sheep  one",
        "cell: UserWarning: it is late",
    ]


def test_units_that_nobody_waits_for_any_more_are_cancelled(executor, tmp_path):
    results = executor.map(remote.work, [(str(tmp_path), 0), *[(str(tmp_path), 60)] * 6])
    next(results)
    results.close()
    assert list(executor.map(remote.fail, [(0,), (2,)])) == [0, 2]  # there is room again


def test_units_that_fit_nowhere_are_refused(executor):
    with pytest.raises(UsageError, match="no node of the Ray cluster has the 2 CPUs and 1 GPUs"):
        executor.map(remote.where, [(0,)], resources=Resources(cpus=2, gpus=1))


def test_every_node_is_asked_for_the_model_and_the_run_folder(executor, tiny, tmp_path):
    executor.require_shared(tiny / "model", tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="cannot read the model folder"):
        executor.require_shared(tmp_path, tmp_path)


def test_more_than_the_object_store_holds_is_explained(executor, monkeypatch):
    import ray

    def full(value):
        raise ray.exceptions.ObjectStoreFullError("no room for 3 GB")

    monkeypatch.setattr(ray, "put", full)
    with pytest.raises(ResumableError, match="no room for 3 GB; give it more with --object-store"):
        executor.put(1)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "head"])
def test_a_cluster_that_is_not_there_is_named(address):
    message = re.escape(f"cannot reach or start the Ray cluster at {address}: ")
    with pytest.raises(UsageError, match=message), open_executor(ExecutorOptions(name="ray", address=address)):
        pass

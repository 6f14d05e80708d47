"""The emulation notices the mistakes it is there for."""

import ctypes

import pytest

FORWARD, BACKWARD, RANDOM = range(3)
FORGET_BARRIER, FORGET_WAIT, SKIP_BARRIER, DECLARE_TOO_MUCH, LOAD_MISALIGNED, DEREFERENCE_MISALIGNED, WRONG_GRID = (
    range(7)
)


@pytest.fixture
def run(emulation):
    def run_faulty(fault, order=FORWARD):
        result, source = (ctypes.c_int * 64)(), (ctypes.c_int * 4)(7, 7, 7, 7)
        emulation.emulation_set_order(order, 1)
        status = emulation.emulation_run_faulty(fault, result, source)
        return list(result), emulation.quantlab_cuda_error(status).decode() if status else None

    return run_faulty


def test_forgotten_barrier_shows_in_the_order_of_threads(run):
    results = [run(FORGET_BARRIER, order)[0] for order in (FORWARD, BACKWARD, RANDOM)]
    right = [(thread + 1) % 64 for thread in range(64)]
    assert all(result != right for result in results)


def test_copy_in_the_background_is_not_there_before_it_is_waited_for(run):
    result, error = run(FORGET_WAIT)
    assert error is None
    assert result == [-1] * 64, "shared memory as it was poisoned"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (SKIP_BARRIER, "never reaches"),
        (DECLARE_TOO_MUCH, "48 KiB"),
        (LOAD_MISALIGNED, "misaligned"),
        (DEREFERENCE_MISALIGNED, "misaligned"),
        (WRONG_GRID, "65535 blocks"),
    ],
)
def test_mistake_ends_the_launch_with_a_status(run, fault, message):
    assert message in run(fault)[1]

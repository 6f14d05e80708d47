"""Rows of the native solvers depend neither on their neighbours nor on the number of threads, to the last bit."""

import subprocess
import sys

import pytest
import torch

from quantlab.api import Lut
from quantlab.solvers.blocks import descend_in_blocks
from quantlab.solvers.codebook import CodebookFit
from quantlab.solvers.descent import descend, relax
from quantlab.solvers.joint import descend_jointly
from quantlab.solvers.nearest import LutRounder
from quantlab.solvers.products import add_products
from quantlab.solvers.sweep import factor_for_sweep, sweep
from quantlab_kernels import solver

ROWS, INPUTS, LEVELS = 150, 90, 8


@pytest.fixture(autouse=True)
def native():
    if not solver.usable(torch.zeros(1)):
        pytest.skip("no native library on this machine")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian():
    data = normal(300, INPUTS, seed=1) @ normal(INPUTS, INPUTS, seed=2)
    return data.T @ data / len(data)


FACTOR = factor_for_sweep(hessian(), torch.arange(INPUTS), 0.01, torch.float32)


def everything(rows):
    """All stages on a selection of rows."""
    weight, table = normal(ROWS, INPUTS, seed=3)[rows], normal(ROWS, LEVELS, seed=4).sort(dim=1).values[rows]
    rounder = LutRounder(Lut(values=table[:, None]), INPUTS)
    swept = sweep(weight, FACTOR, rounder)
    descended = descend(weight, swept, hessian(), torch.arange(INPUTS), rounder, sweeps=2)
    generator = torch.Generator().manual_seed(5)
    operands = (weight, descended, table, hessian(), torch.arange(INPUTS))
    blocks = descend_in_blocks(*operands, passes=1, generator=generator)
    fit = CodebookFit(weight, hessian())
    fitted, loss = fit.refit(table, blocks)
    joint, joint_loss = descend_jointly(weight, fitted, loss, hessian(), torch.arange(INPUTS), fit, passes=2)
    relaxed = relax(descended.error, hessian(), torch.arange(INPUTS))
    return [
        swept.codes,
        swept.error,
        swept.loss,
        descended.codes,
        descended.loss,
        blocks.codes,
        joint.codes,
        joint_loss,
        fitted.levels,
        loss,
        relaxed,
    ]


def products():
    inputs, drift = normal(700, 200, seed=6), normal(700, 200, seed=7)
    sums = torch.zeros(2, 200, 200)
    add_products(sums[0], inputs, inputs)
    add_products(sums[1], drift, inputs)
    return sums


@pytest.mark.parametrize(
    "rows",
    [slice(0, 1), slice(63, 66), slice(7, 140), torch.arange(ROWS - 1, -1, -1)],
    ids=["one", "few", "most", "all"],
)
def test_rows_do_not_depend_on_their_neighbours(rows):
    for whole, part in zip(everything(slice(None)), everything(rows), strict=True):
        assert torch.equal(whole[rows], part)


def test_results_do_not_depend_on_the_number_of_threads(threads):
    threads(1)
    single, summed = everything(slice(None)), products()
    for count in (2, 3):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(single, everything(slice(None)), strict=True))
        assert torch.equal(summed, products())


def test_a_process_that_was_forked_gets_the_same_result():
    code = """
import os, signal, torch
from quantlab_kernels import solver
torch.manual_seed(0)
torch.set_num_threads(2)
matrix, hessian, codes = torch.randn(256, 64), torch.randn(64, 64), torch.randint(0, 8, (256, 64), dtype=torch.uint8)
hessian = hessian @ hessian.T
def run():
    gram = solver.HessianTriangle(hessian).level_gram(codes, 8)
    return torch.cat([solver.multiply_symmetric(matrix, hessian).flatten(), gram.flatten()])
plain = run()
child = os.fork()
if not child:
    signal.alarm(60)  # a child that waits for threads that are gone does so for ever
    assert torch.equal(run(), plain)
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    subprocess.run([sys.executable, "-c", code], check=True)

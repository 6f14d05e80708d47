"""Methods with one planted defect each, most of them seen in published code, and the checks that find them.

They are the evidence that the checks can fail, and a place to look up what a failing check may mean.
"""

from quantlab.testing.mutants import declaration, numerics, purity, result
from quantlab.testing.mutants.honest import HonestOutliers, HonestRounding, HonestSweep
from quantlab.testing.mutants.planting import MUTANTS, Mutant

__all__ = [
    "MUTANTS",
    "HonestOutliers",
    "HonestRounding",
    "HonestSweep",
    "Mutant",
    "declaration",
    "numerics",
    "purity",
    "result",
]

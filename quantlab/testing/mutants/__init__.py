"""Methods with one planted defect each, most of them seen in published code, and the checks that find them.

They are the evidence that the checks can fail, and a place to look up what a failing check may mean.
"""

from quantlab.testing.mutants import declaration, fisher, numerics, purity, result, robustness
from quantlab.testing.mutants.honest import HonestFisher, HonestOutliers, HonestPreparation, HonestRounding, HonestSweep
from quantlab.testing.mutants.planting import MUTANTS, Mutant

__all__ = [
    "MUTANTS",
    "HonestFisher",
    "HonestOutliers",
    "HonestPreparation",
    "HonestRounding",
    "HonestSweep",
    "Mutant",
    "declaration",
    "fisher",
    "numerics",
    "purity",
    "result",
    "robustness",
]

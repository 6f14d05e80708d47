"""Every error that quantlab raises on purpose, each with the exit code of the command line."""

import difflib
from collections.abc import Iterable


class QuantlabError(Exception):
    """Base class. The message says what is wrong, where, why, and what to try; no traceback is needed."""

    exit_code = 1


class UsageError(QuantlabError):
    """The command line asks for something that does not exist or may not be done."""

    exit_code = 2


class QualityError(QuantlabError):
    """A result is not good enough: a failed check, a fallback that was not allowed."""

    exit_code = 3


class RecipeError(QuantlabError):
    """A recipe is malformed or asks for something impossible."""

    exit_code = 78


class ModelError(QuantlabError):
    """A model folder is missing, unreadable or of a kind that cannot be quantized."""

    exit_code = 78


class DataError(QuantlabError):
    """Calibration or evaluation text is missing, unreadable or too short."""

    exit_code = 78


class CheckpointError(QuantlabError):
    """A quantized checkpoint is missing, damaged or of an unknown version."""

    exit_code = 78


class PluginError(QuantlabError):
    """A quantization method is not installed, claimed twice, or does not fulfil the contract."""

    exit_code = 78


class InstallationError(QuantlabError):
    """What quantlab needs is missing, of the wrong version, or in the way of something else."""

    exit_code = 78


class NumericalError(QuantlabError):
    """A layer cannot be solved in floating point; the message names the layer's data and what was tried."""


class ResumableError(QuantlabError):
    """A run ended early for a reason outside itself; what it has finished is kept, and the same command goes on."""

    exit_code = 75


class MemoryShortageError(ResumableError):
    """Memory cannot be had."""

    exit_code = 4


def did_you_mean(word: object, candidates: Iterable[str]) -> str:
    """A hint at the most similar candidate, to be put behind a message; empty if none is similar."""
    matches = difflib.get_close_matches(str(word), list(candidates), n=1)
    return f"; did you mean {matches[0]}?" if matches else ""

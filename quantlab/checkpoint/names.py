"""What stands where in the folder of a run."""

MODEL_FOLDER = "model"
"""The checkpoint."""

RECIPE_NAME = "recipe.yaml"
"""What was asked for, as it was written."""

RESOLVED_RECIPE_NAME = "recipe.resolved.yaml"
"""The same with every default filled in."""

MANIFEST_NAME = "manifest.json"
"""Everything that is needed to understand and to repeat the run; complete runs have it."""

EVALUATION_NAME = "eval.json"
"""What was measured beside the float model."""

LOG_NAME = "log.txt"
"""What happened, with times."""

PROFILE_FILE = "profile.json"
"""What `quantlab.evaluate.profile.profile_subjects` returned for the run beside the float model, if it was measured."""

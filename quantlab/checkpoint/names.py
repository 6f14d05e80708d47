"""What stands where in the folder of a run."""

MODEL_FOLDER = "model"
"""The checkpoint."""

MANIFEST_NAME = "manifest.json"
"""Everything that is needed to understand and to repeat the run; complete runs have it."""

PROFILE_FILE = "profile.json"
"""What `quantlab.evaluate.profile.profile_subjects` returned for the run beside the float model, if it was measured."""

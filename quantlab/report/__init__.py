"""Reports: what a run folder's `manifest.json` and `eval.json` say, as a table and as a page."""

"""The command line: parses, calls and prints. Importing it, and `--help`, import no torch."""

from quantlab.cli.app import main

__all__ = ["main"]

"""`python -m quantlab` is the command `quantlab`."""

from quantlab.cli import main

main()

"""How good a model is: perplexity on held-out text."""

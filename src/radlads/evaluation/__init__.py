"""How good a finished model is, measured on held-out text."""

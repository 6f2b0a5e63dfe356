"""Using a model: streaming generation with carried state, and how long a token takes."""

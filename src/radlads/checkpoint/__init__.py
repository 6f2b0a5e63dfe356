"""Files that hold models and finished stages: written whole or not at all, read strictly."""

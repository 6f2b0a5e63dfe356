"""Token files, sample positions and the text of the running Python."""

"""Running a stage.

Its rooms, from the lowest: processes, corpora, optimizers, logging, engines, checkpoints; above them the run itself,
whose files lie here.
"""

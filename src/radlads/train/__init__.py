"""Running a stage. Rooms, from the lowest: processes, corpora, optimizers, logging, engines, checkpoints; then the run."""

"""How processes share the work of a stage: one file for each way, found by the name in train.strategy."""

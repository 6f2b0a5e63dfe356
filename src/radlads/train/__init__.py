"""Running a stage: optimiser, schedule, Lightning. The only door to lightning."""

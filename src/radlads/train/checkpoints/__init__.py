"""Checkpoints inside a stage: their files, and which of them a run goes on from.

Model files are radlads.checkpoint's.
"""

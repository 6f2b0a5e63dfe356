"""Texts that a model writes to be learnt from: many replies at a time, and files of them."""

"""Optimisers by name, their rates, and one step of theirs."""

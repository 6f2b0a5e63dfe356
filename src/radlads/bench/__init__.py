"""Measuring speed and memory on the machine at hand: `radlads bench`."""

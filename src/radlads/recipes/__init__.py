"""Whole conversions: setup, stages, measurements, export, report."""

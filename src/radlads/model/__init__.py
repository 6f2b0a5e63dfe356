"""The one model definition, for teacher and student, training and export. Flat and closed (docs/architecture.md)."""

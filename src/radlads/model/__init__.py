"""The one model definition: teacher and student, training, inference and export. Flat and closed (docs/architecture.md)."""

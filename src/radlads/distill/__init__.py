"""What a stage is, its losses, and what a student is measured by."""

"""From a teacher's folder to the frozen teacher and the student that starts from its weights."""

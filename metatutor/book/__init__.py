"""What the chapters need and no researcher does: figures, exercises, and where their characters come from."""

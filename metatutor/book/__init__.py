"""What the chapters need and researchers do not: figures, exercises, and where their characters come from."""

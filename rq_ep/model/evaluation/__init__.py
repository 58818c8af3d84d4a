"""Models side by side on held-out text."""

"""The placement solver on synthetic traces."""

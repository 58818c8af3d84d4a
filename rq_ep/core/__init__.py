"""The nouns: topology, expert statistics, placement, plan, cost. NumPy and files, no torch."""

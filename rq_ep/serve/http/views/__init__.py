"""What the routes show of a group: its load, its history, its members and its re-placements."""

"""The split of one step over replicas, decided in every layer and step; it imports nothing of the search."""

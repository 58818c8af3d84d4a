"""The split of one step over replicas, decided in every layer and step; nothing here knows the search."""

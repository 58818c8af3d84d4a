"""The exact split of one step over replicas, and the placement of replicas under byte budgets."""

"""The search for a placement inside byte budgets: construction, local search, ruin and recreate."""

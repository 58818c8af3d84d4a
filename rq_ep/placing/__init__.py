"""The verb `place`: from statistics and a budget to a placement."""

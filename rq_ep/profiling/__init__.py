"""Timings of this machine, from which a cost model is fitted."""

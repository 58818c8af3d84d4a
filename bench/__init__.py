"""Measurements of rq_ep. `python -m bench --help` lists them; README.md has the protocol, results/ the findings."""

"""One MoE layer: its time under every strategy, the time of planning, and what it spends besides products."""

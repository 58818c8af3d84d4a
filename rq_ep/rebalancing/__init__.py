"""Rebalancing while serving: loads are observed, and a better placement is planned and accepted, or not. No torch."""

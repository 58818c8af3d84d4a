"""Searches for engines with equally many slots on every rank."""

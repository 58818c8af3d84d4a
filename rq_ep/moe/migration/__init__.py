"""Experts that move between ranks beside the steps of a group that serves."""

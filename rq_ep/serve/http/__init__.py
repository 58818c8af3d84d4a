"""The HTTP process: routes, metrics, and the ranks as it sees them. It does not import torch."""

"""The HTTP process: routes, metrics, and the ranks as it sees them. It imports torch only to read images."""

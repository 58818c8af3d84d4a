"""Cost models: seconds of a plan on a given machine."""

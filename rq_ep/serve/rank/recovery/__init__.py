"""Going on without ranks that are lost or leave, and with those that join."""

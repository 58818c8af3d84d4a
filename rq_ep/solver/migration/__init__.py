"""From a placement that serves to the next one: what to keep, what to move, in which order."""

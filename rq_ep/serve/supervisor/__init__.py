"""The small process, without torch, that a launcher starts for each rank, and that starts the rank's process."""

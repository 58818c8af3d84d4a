"""Loading a checkpoint onto the ranks of a group."""

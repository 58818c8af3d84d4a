"""Lockstep continuous batching: every rank batches its own requests, and all of them enter every MoE layer together."""

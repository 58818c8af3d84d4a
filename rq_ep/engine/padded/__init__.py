"""Continuous batching over the cache that `generate` uses, for families that have no paged one."""

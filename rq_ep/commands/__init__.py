"""The sub-commands of `rq-ep`, one file each.

A file holds `configure(parser)`, which declares its options without importing anything slow, and `run(args)`.
"""

"""A server under load: its latency and throughput, and whether it loses anything."""

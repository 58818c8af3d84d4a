"""The seam into transformers: where the routed experts of a model are."""

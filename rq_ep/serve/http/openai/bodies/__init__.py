"""Parts of the bodies of requests."""

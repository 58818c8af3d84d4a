"""One rank of the server, from the check of its settings to its last message."""

"""The ranks as the HTTP process sees them: their connections, their requests, and why they end."""

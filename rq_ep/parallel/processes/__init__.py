"""What a group of processes is made of: how they meet, what they talk over, and how that is ended."""

"""Weight formats: what they cost and save, and what low bits do to answers."""

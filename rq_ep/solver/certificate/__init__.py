"""What a finished placement promises, and a lower bound beside it."""

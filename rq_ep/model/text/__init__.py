"""Text, tokens, and how known text is run through a model."""

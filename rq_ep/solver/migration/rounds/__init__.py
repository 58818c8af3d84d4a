"""What a round of moves takes along: what ranks hold, which formats change, who sends, what arrives together."""

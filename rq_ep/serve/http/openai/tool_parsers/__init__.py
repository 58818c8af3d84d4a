"""The parts of an answer: reasoning, content and calls of tools, in the formats in which models write them."""

"""OpenAI's API: bodies of requests and responses, streamed or whole."""

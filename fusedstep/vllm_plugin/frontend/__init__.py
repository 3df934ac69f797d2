"""The process that has the clients: the API server, or the one of an LLM."""

"""The window: static buffers, THE loop, and what it leaves for the host. Knows nothing of vLLM."""

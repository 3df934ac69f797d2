"""The fused step, attention and the loop against stock vLLM's own, kernel by kernel."""

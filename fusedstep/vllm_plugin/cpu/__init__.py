"""vLLM's Model Runner V2 on a CPU: the platform, and native code for its Triton kernels."""

"""Device code: Triton kernels, nothing else. Imports triton only.

Import it as ``fusedstep.kernels``. ``fusedstep/ops/triton_step.py`` launches it; a decode step is
``sample.py``, and ``truncate.py`` where a row has top-k or top-p.
"""

# vLLM takes any importable top-level ``triton_kernels`` for the upstream Triton package, and
# uses its own vendored copy when the import fails.
if __name__ == "triton_kernels":
    raise ImportError("this folder is fusedstep.kernels, not the upstream package triton_kernels")

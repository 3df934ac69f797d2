"""Device code: Triton kernels, nothing else. Imports triton only.

Import it as ``fusedstep.kernels``. ``fusedstep/ops/triton_step.py`` launches it. A decode step is
``sample.py``, then ``draw.py`` where stock vLLM has applied top-k or top-p in between;
``truncate.py`` applies them where there is no vLLM.
"""

# vLLM takes any importable top-level ``triton_kernels`` for the upstream Triton package, and
# uses its own vendored copy when the import fails.
if __name__ == "triton_kernels":
    raise ImportError("this folder is fusedstep.kernels, not the upstream package triton_kernels")

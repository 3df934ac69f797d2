"""A stand-in Triton backend for the CPU: Model Runner V2's rare kernels run interpreted.

vLLM's Model Runner V2 is written in Triton. On the CPU its hot kernels are replaced by native
code (``stock_kernels``); the rest (prompt logprobs, grammar bitmasks...) runs in Triton's own
interpreter, which needs no compiler, only a backend named "cpu" that says it is there.
"""

from __future__ import annotations

import os


def install() -> None:
    """Switch Triton's interpreter on and enter the stand-in. Before vLLM looks for Triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.backends import Backend, backends
    from triton.backends.compiler import BaseBackend
    from triton.backends.driver import DriverBase

    if "cpu" in backends:
        return

    class InterpreterDriver(DriverBase):  # type: ignore[misc]
        """Never active: the interpreter launches nothing, and Inductor must not find a device.

        vLLM's CPU build only asks whether there is a backend of this name.
        """

        @classmethod
        def is_active(cls) -> bool:
            return False

    backends["cpu"] = Backend(compiler=BaseBackend, driver=InterpreterDriver)

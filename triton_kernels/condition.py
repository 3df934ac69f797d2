"""Whether a loop on the device goes on, and the word to the WHILE node that repeats it.

The CUDA device function is declared in PTX, as the CUDA headers declare it; the driver knows its
name, so that nothing has to be linked. See NVIDIA's programming guide, "Conditional graph nodes".
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["handle"])
def set_condition_kernel(
    handle: tl.uint64,  # the cudaGraphConditionalHandle; unused unless CONDITIONAL
    num_active_ptr,  # [1] int32
    stop_flag_ptr,  # [1] int32, host memory mapped to the device: not 0 ends the loop
    go_on_ptr,  # [1] int32, what was decided
    CONDITIONAL: tl.constexpr,
):
    """Grid (1,): go on while a row is active and the host has not asked for an end."""
    stop_flag = tl.load(stop_flag_ptr, volatile=True)
    go_on = ((tl.load(num_active_ptr) > 0) & (stop_flag == 0)).to(tl.int32)
    tl.store(go_on_ptr, go_on)
    if CONDITIONAL:
        tl.inline_asm_elementwise(
            """
            {
            .extern .func cudaGraphSetConditional (.param .b64 handle, .param .b32 value);
            .param .b64 handle;
            .param .b32 value;
            st.param.b64 [handle], $1;
            st.param.b32 [value], $2;
            call.uni cudaGraphSetConditional, (handle, value);
            mov.u32 $0, $2;
            }
            """,
            "=r,l,r",
            [handle, go_on],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )

"""PTX kernel that sets the condition of the CUDA-graph WHILE node: run the body once more?

PTX, because Triton cannot call ``cudaGraphSetConditional``: the function belongs to the driver,
which links it when it compiles this text for the GPU at hand.

``num_active`` and ``seen`` are plain loads: an earlier kernel of the graph has written the first, a
copy before the graph the second. The host writes ``arrivals`` at any time, so its load has system
scope: each iteration reads host memory, not a cached value. Relaxed is enough, because no other
load depends on what it reads.
"""

from __future__ import annotations

# set_condition(handle, num_active, arrivals, seen), one thread: the body runs again while
# *num_active (int32) > 0 and *arrivals (int64, host memory that the host writes) <= *seen (int64).
PTX = """\
.version 7.0
.target sm_70
.address_size 64

.extern .func cudaGraphSetConditional
(
    .param .b64 cudaGraphSetConditional_param_0,
    .param .b32 cudaGraphSetConditional_param_1
);

.visible .entry set_condition
(
    .param .u64 handle,
    .param .u64 num_active,
    .param .u64 arrivals,
    .param .u64 seen
)
{
    .reg .pred %p<3>;
    .reg .b32 %r<3>;
    .reg .b64 %rd<7>;

    ld.param.u64 %rd0, [handle];
    ld.param.u64 %rd1, [num_active];
    ld.param.u64 %rd2, [arrivals];
    ld.param.u64 %rd3, [seen];
    cvta.to.global.u64 %rd1, %rd1;
    cvta.to.global.u64 %rd3, %rd3;
    ld.global.s32 %r0, [%rd1];
    ld.relaxed.sys.s64 %rd4, [%rd2];
    ld.global.s64 %rd5, [%rd3];
    setp.gt.s32 %p0, %r0, 0;
    setp.le.and.s64 %p1, %rd4, %rd5, %p0;
    selp.u32 %r1, 1, 0, %p1;
    {
        .param .b64 param0;
        st.param.b64 [param0], %rd0;
        .param .b32 param1;
        st.param.b32 [param1], %r1;
        call.uni cudaGraphSetConditional, (param0, param1);
    }
    ret;
}
"""

"""The forms of the loop: the one place that names them all."""

from __future__ import annotations

from enum import StrEnum


class LoopForm(StrEnum):
    """How the steps of a window are enqueued, best first. Every form gives the same tokens."""

    WHILE = "while"  # one CUDA graph, whose WHILE node repeats the step on the device
    UNROLLED = "unrolled"  # a CUDA graph of several steps
    REPLAY = "replay"  # a CUDA graph of one step
    EAGER = "eager"  # the step's own calls

    @property
    def is_recorded(self) -> bool:
        """Does it need CUDA graphs?"""
        return self is not LoopForm.EAGER

    @property
    def can_be_ended(self) -> bool:
        """Does an arrival end a window of this form after the step in flight?"""
        return self is not LoopForm.UNROLLED

    @property
    def fallback(self) -> LoopForm:
        """The form that is tried where this one cannot be had."""
        return LoopForm.EAGER if self is LoopForm.REPLAY else LoopForm.REPLAY


# ``auto`` begins here: the unrolled form is only for those who ask, as it cannot be ended.
BEST = LoopForm.WHILE

"""The experts that took each token (``--enable-return-routed-experts``), of a window's steps.

vLLM's capturer writes a step's experts over those of the step before. Here every step of a window
keeps its own on the device, and the window's end hands all of them to vLLM's connector at once: as
those of a stock step that computed several tokens of each request.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fusedstep.ops.types import WindowRows
from fusedstep.window.host_copies import HostCopies
from fusedstep.window.state import WindowSlot

if TYPE_CHECKING:
    from vllm.distributed.aux_output_connector.connector import AuxRequestOutput
    from vllm.distributed.aux_output_connector.worker import (
        AuxOutputWorkerConnector,
        PendingAuxOutput,
    )
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu.states import RequestState

# The outputs of a window's requests, by id, once its tokens are counted: [num_reqs] int32.
Outputs = Callable[[np.ndarray], "dict[str, AuxRequestOutput]"]

# By the name of vLLM's dtype for them. Torch does not index 16 bits without a sign.
DTYPES = {"uint8": torch.uint8, "uint16": torch.int16}


class RoutedExperts:
    """The experts that steps keep, and two buffers for the host: window n uses buffer n mod 2.

    It stands between a step's pending output and vLLM's connector.
    """

    def __init__(self, connector: AuxOutputWorkerConnector, rows: WindowRows) -> None:
        capturer = connector._capturer
        self.connector, self.rows = connector, rows
        self.captured = capturer.device_buffer  # [max_num_tokens, layers, experts of a token] int32
        self.shape = capturer.shape_per_token
        self.numpy_dtype = np.dtype(capturer.output_dtype_name)
        self.dtype = DTYPES[capturer.output_dtype_name]
        device = rows.num_sampled.device
        max_steps, max_num_reqs = rows.out_tokens.shape
        self.row_numbers = torch.arange(max_num_reqs, device=device)
        width = self.captured[0].numel()
        # [(max_steps + 1) * num_rows, width], by step and batch_idx. A row at rest writes behind
        # its last token, where nobody reads.
        self.kept = torch.zeros(
            ((max_steps + 1) * max_num_reqs, width), dtype=self.dtype, device=device
        )
        self.copies = [HostCopies(device) for _ in range(2)]
        shape = max_steps * max_num_reqs, width
        self.buffers = [each.buffer("experts", shape, self.dtype) for each in self.copies]
        self.count = 0
        self.req_ids: list[str] = []
        self.starts = np.zeros(0, dtype=np.int32)

    def keep(self, num_rows: int) -> None:
        """After the forward of a step, which gives a row its token number ``num_sampled``."""
        index = self.rows.num_sampled[:num_rows] * num_rows + self.row_numbers[:num_rows]
        captured = self.captured[:num_rows].flatten(1).to(self.dtype)
        self.kept.index_copy_(0, index, captured)

    def stage(
        self,
        scheduler_output: SchedulerOutput,
        req_states: RequestState,
        rows: np.ndarray,  # [num_reqs] int64, batch_idx -> req_state_idx
    ) -> None:
        """The coming window's requests; tells the connector of all that vLLM scheduled."""
        self.connector.begin_step(scheduler_output.aux_output_connector_metadata)
        self.req_ids = [req_states.index_to_req_id[row] for row in rows.tolist()]
        self.starts = req_states.num_computed_tokens_np[rows]  # an upper bound, as in vLLM

    def fetch(self, slot: WindowSlot, stream: torch.cuda.Stream | None) -> Outputs | None:
        """The window's work is enqueued: bring its experts; None on a rank that hands none over.

        Every row has room for all steps: those that it did not take, vLLM knows as rejected drafts.
        """
        n, steps, num_rows = slot.num_reqs, slot.steps_run, slot.num_rows
        room = max(steps, 1)
        batch: Any = SimpleNamespace(
            req_ids=self.req_ids,
            num_computed_tokens_np=self.starts,
            query_start_loc_np=np.zeros(n + 1, dtype=np.int32),  # no snapshot of the last step
        )
        pending = self.connector.prepare_output(batch)
        if pending is None:
            return None
        self.take(pending)
        pending.query_start_loc = np.arange(n + 1) * room
        copies, buffer = self.copies[self.count % 2], self.buffers[self.count % 2]
        self.count += 1
        buffer[: steps * num_rows].copy_(self.kept[: steps * num_rows])
        copies.bring({"experts": buffer[: steps * num_rows]}, stream)

        def outputs(num_sampled: np.ndarray) -> dict[str, AuxRequestOutput]:
            flat = copies.arrived()["experts"].view(self.numpy_dtype)
            of_steps = flat[: steps * num_rows].reshape(steps, num_rows, *self.shape)
            experts = np.zeros((n, room, *self.shape), self.numpy_dtype)
            experts[:, :steps] = of_steps[:, :n].swapaxes(0, 1)
            pending.routed_experts = experts.reshape(n * room, *self.shape)
            pending.num_sampled, pending.num_rejected = num_sampled, room - num_sampled
            told: dict[str, AuxRequestOutput] = pending.process_output()
            return told

        return outputs

    def take(self, pending: PendingAuxOutput | None) -> None:
        """A step's output, None if this rank has none, comes to us before the connector gets it."""
        if pending is not None:
            pending.connector = self

    def process_output(self, pending: PendingAuxOutput) -> dict[str, AuxRequestOutput]:
        """The outputs of a step, its copies being there. Steps come in the order they ran.

        vLLM knows of a step only an upper bound of its requests' computed tokens, and holds that
        no step before left out more than it computed and rejected. Of a reservation that became a
        stock step that is not true; here it is known what each request has computed.
        """
        known = self.connector._requests
        cursors = [known[req_id].capture_cursor for req_id in pending.request_ids]
        starts = pending.token_starts.tolist()
        pending.token_starts = np.asarray(
            [
                start if cursor is None else min(start, cursor)
                for start, cursor in zip(starts, cursors, strict=True)
            ],
            dtype=np.int64,
        )
        told: dict[str, AuxRequestOutput] = self.connector.process_output(pending)
        return told


def routed_by(experts: RoutedExperts | None, output: Any) -> Any:
    """The output of a stock step, whose experts come to us first if anybody asks for them."""
    if experts is not None and output is not None:
        experts.take(output.pending_aux_output)
    return output

"""Recurrent states of a window's rows, eagerly and on a tape, as a recorded step has them.

The tape knows addresses only, and refuses whatever would wait for the device.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import MambaSpec
from window.tape import TapeRecorder

from fusedstep.ops.types import WindowRows
from fusedstep.vllm_plugin.runner.recurrent import RecurrentState

R, WIDTH, BLOCK_SIZE = 6, 4, 8
STATE = MambaSpec(block_size=BLOCK_SIZE, shapes=((2,),), dtypes=(torch.float32,))


class Mamba2AttentionMetadataBuilder:
    pass


class GDNAttentionMetadataBuilder:
    mamba_aligned_state_indices: torch.Tensor | None = torch.ones(R, 1)


class Copies:
    """Stands in for vLLM's kernel: notes what it was told."""

    def __init__(self) -> None:
        self.previous = torch.zeros(R + 1, dtype=torch.int32)
        self.running = torch.zeros(R + 1, dtype=torch.int32)

    def run_fused_precopy(
        self, num_rows: int, running: Any, previous: Any, bias: Any, idx_mapping: Any
    ) -> None:
        self.running.copy_(running)
        self.previous.copy_(previous)


class World:
    """Two groups of layers: one whose metadata has its indices in a column, one in a vector."""

    def __init__(self, mode: str) -> None:
        self.rows = WindowRows.allocate(R, 8)
        self.positions = torch.zeros(R, dtype=torch.int64)
        width = WIDTH if mode == "align" else 1
        self.tables = [torch.zeros(R, width, dtype=torch.int32) for _ in range(2)]
        self.copies = Copies()
        self.model_state = SimpleNamespace(
            _get_mamba_group_info=lambda _: ([0, 1], STATE),
            _mamba_ctx=self.copies,
            _mamba_state_idx_gpu=torch.arange(R, dtype=torch.int32),
        )
        self.states = [torch.ones(5, 2), torch.ones(5, 3)]
        builders = [Mamba2AttentionMetadataBuilder(), GDNAttentionMetadataBuilder()]
        groups: Any = [
            SimpleNamespace(
                layer_names=[f"layer {n}"],
                kv_cache_group_id=n,
                kv_cache_spec=STATE,
                get_metadata_builder=lambda _, builder=builder: builder,
            )
            for n, builder in enumerate(builders)
        ]
        runner: Any = SimpleNamespace(
            input_buffers=SimpleNamespace(positions=self.positions),
            block_tables=SimpleNamespace(input_block_tables=self.tables),
            compilation_config=SimpleNamespace(
                static_forward_context={
                    f"layer {n}": SimpleNamespace(kv_cache=[state])
                    for n, state in enumerate(self.states)
                }
            ),
            vllm_config=SimpleNamespace(cache_config=SimpleNamespace(mamba_cache_mode=mode)),
            model_state=self.model_state,
            kv_cache_config=None,
            max_num_reqs=R,
            device=torch.device("cpu"),
        )
        self.recurrent = RecurrentState(runner, groups, self.rows)
        self.metadata = {
            "layer 0": SimpleNamespace(state_indices_tensor_d=torch.zeros(4, 1, dtype=torch.int32)),
            "layer 1": SimpleNamespace(
                non_spec_state_indices_tensor=torch.zeros(4, dtype=torch.int32)
            ),
        }

    def place(self) -> None:
        """Requests 3 and 1, which goes on into a new block, 4 that is not active, and padding."""
        self.rows.idx_mapping[:4] = torch.tensor([3, 1, 4, -1])
        self.rows.active[:4] = torch.tensor([True, True, False, False])
        self.positions[:4] = torch.tensor([5, 2 * BLOCK_SIZE, 3 * BLOCK_SIZE, 0])
        for n, table in enumerate(self.tables):
            table.copy_(100 * (n + 1) + torch.arange(table.numel()).view(table.shape))

    def step(self) -> None:
        self.recurrent.prepare_step(4)
        self.recurrent.move_along(self.metadata, 4)

    def seen(self) -> list[list[int]]:
        first, second = self.metadata.values()
        return [
            first.state_indices_tensor_d[:, 0].tolist(),
            second.non_spec_state_indices_tensor.tolist(),
            self.copies.previous[:R].tolist(),
            self.model_state._mamba_state_idx_gpu.tolist(),
        ]


def run(world: World, recorded: bool) -> list[list[int]]:
    """A step, recorded while all rows were padding or not."""
    if not recorded:
        world.place()
        world.step()
        return world.seen()
    world.rows.idx_mapping[:4] = -1
    tape = TapeRecorder().record(world.step)
    world.place()
    tape.replay()
    return world.seen()


@pytest.mark.parametrize("recorded", [False, True])
def test_states_in_one_block(recorded: bool) -> None:
    first, second, _, _ = run(World("none"), recorded)
    assert first == [100, 101, 0, 0]  # the null block for who must not advance
    assert second == [200, 201, 0, 0]


@pytest.mark.parametrize("recorded", [False, True])
def test_states_of_every_block(recorded: bool) -> None:
    first, second, previous, running = run(World("align"), recorded)
    assert first == [100, 100 + WIDTH + 2, 0, 0]
    assert second == [200, 200 + WIDTH + 2, 0, 0]
    # By request: 3 stays in its first block, 1 goes from its second to its third. The others'
    # states are not touched, and vLLM's own steps find their blocks as they were.
    assert previous == [-1, 1, -1, 0, -1, -1]
    assert running == [0, 2, 2, 0, 4, 5]


def test_indices_of_a_stock_step_are_not_taken_for_a_windows() -> None:
    world = World("align")
    world.recurrent.begin()
    assert world.recurrent.layers[1].builder.mamba_aligned_state_indices is None


def test_states_are_forgotten_in_the_first_blocks() -> None:
    world = World("none")
    world.recurrent.forget(3)
    for state in world.states:
        assert not state[:3].any() and state[3:].all()

"""Which form of the loop an engine gets, and what happens when a form cannot be recorded."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.kv_cache_interface import MambaSpec

from fusedstep.loop_forms import LoopForm
from fusedstep.vllm_plugin.runner import recording as forms
from fusedstep.vllm_plugin.runner.decode_model import padded_rows
from fusedstep.vllm_plugin.runner.recording import Form, LoopParts, StepStore, choose
from fusedstep.window import recorder
from fusedstep.window.proof import WrongTokensError

SIZES = (1, 2, 4, 8)
PIECES: tuple[int, ...] = ()
STEP_BYTES = 1000  # a recorded batch of n rows takes n times as much


class Manager:
    """vLLM's graph manager: full decode graphs for SIZES, piecewise ones for PIECES."""

    def dispatch(self, num_reqs: int, num_tokens: int, num_active_loras: int, **_: Any) -> Any:
        size = next((s for s in (*SIZES, *PIECES) if s >= num_tokens), None)
        mode = CUDAGraphMode.PIECEWISE if size in PIECES else CUDAGraphMode.FULL
        mode = CUDAGraphMode.NONE if size is None else mode
        return SimpleNamespace(
            cg_mode=mode, num_tokens=size or num_tokens, num_active_loras=num_active_loras
        )


STATE = MambaSpec(block_size=16, shapes=((2, 3),), dtypes=(torch.float32,))


def runner(
    device: str = "cuda",
    mode: CUDAGraphMode | None = CUDAGraphMode.FULL_AND_PIECEWISE,
    tensor_parallel_size: int = 1,
    in_place: tuple[bool, ...] = (True, True),  # the attention's groups
    name: str = "SOME_ATTN",
    states: bool = False,  # a hybrid model
    drafter: str | None = None,  # its attention
) -> Any:
    attention = SimpleNamespace(get_name=lambda: name)
    recurrent = SimpleNamespace(get_name=lambda: "RECURRENT_ATTN")
    groups = [
        SimpleNamespace(
            supports_draft_decode_metadata_update=can, backend=attention, kv_cache_spec=None
        )
        for can in in_place
    ]
    if states:
        groups.append(
            SimpleNamespace(
                supports_draft_decode_metadata_update=False,
                backend=recurrent,
                kv_cache_spec=STATE,
            )
        )
    drafts = SimpleNamespace(backend=SimpleNamespace(get_name=lambda: drafter))
    return SimpleNamespace(
        speculator=None if drafter is None else SimpleNamespace(attn_groups=[[drafts]]),
        device=torch.device(device),
        compilation_config=SimpleNamespace(cudagraph_mode=mode),
        parallel_config=SimpleNamespace(tensor_parallel_size=tensor_parallel_size),
        cudagraph_manager=Manager(),
        max_num_reqs=10,
        attn_groups=[[group] for group in groups],
        kv_cache_config=SimpleNamespace(num_blocks=100),
    )


def graph_store(form: Form, cases: tuple[int, ...] = (0,), **options: Any) -> StepStore:
    adapters = SimpleNamespace(graph_cases=cases, made_up=nullcontext)
    model: Any = SimpleNamespace(stage=None, adapters=adapters, forget_states=None)
    unused: Any = None
    state: Any = SimpleNamespace(grammar=None)
    parts = LoopParts(model, unused, unused, state, unused, unused, None)
    return StepStore(runner(**options), parts, form)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU whose driver has WHILE nodes; ``broken`` forms cannot be recorded there."""
    machine = SimpleNamespace(broken=set(), wrong=set(), recorded=[], proved=[], free=1_000_000)
    machine.adapters = []  # of each recorded batch
    machine.group = SimpleNamespace(world_size=1)

    class Graphs:
        def __init__(self, form: str, *_: Any) -> None:
            self.form = form

        def record(self, recorder: Any, num_rows: int, num_loras: int) -> None:
            if self.form in machine.broken:
                raise RuntimeError(f"no {self.form} today\nand much more")
            machine.recorded.append((self.form, num_rows))
            machine.adapters.append(num_loras)
            machine.free -= num_rows * STEP_BYTES

    class Proof:
        def __init__(self, state: Any, graphs: Graphs, *_: Any) -> None:
            self.form = graphs.form

        def check(self, num_rows: int) -> None:
            machine.proved.append((self.form, num_rows))
            if self.form in machine.wrong:
                raise WrongTokensError("its tokens are not those of the eager loop")

    @contextmanager
    def graph_capture(device: torch.device) -> Any:
        yield

    monkeypatch.setattr(forms, "WindowGraphs", Graphs)
    monkeypatch.setattr(forms, "Proof", Proof)
    monkeypatch.setattr(forms, "graph_capture", graph_capture)
    monkeypatch.setattr(forms, "is_global_first_rank", lambda: False)
    monkeypatch.setattr(forms, "CudaRecorder", lambda *_: None)
    monkeypatch.setattr(recorder, "no_while_reason", lambda: None)
    monkeypatch.setattr(forms, "get_tp_group", lambda: machine.group)
    monkeypatch.setattr(forms, "_free_bytes", lambda: machine.free)
    return machine


@pytest.mark.parametrize(
    ("engine", "loop", "form", "words"),
    [
        ({}, "auto", "while", "works here"),
        ({}, "unrolled", "unrolled", "works here"),
        ({}, "eager", "eager", "works here"),
        ({"device": "cpu"}, "auto", "eager", "cpu"),
        ({"tensor_parallel_size": 2}, "auto", "replay", "while: tensor parallelism"),
        ({"tensor_parallel_size": 2}, "unrolled", "unrolled", "works here"),
        ({"mode": CUDAGraphMode.NONE}, "auto", "eager", "replay: no full CUDA graphs"),
        ({"mode": CUDAGraphMode.PIECEWISE}, "unrolled", "eager", "unrolled: no full CUDA graphs"),
        ({"in_place": (True, False)}, "auto", "replay", "while: SOME_ATTN plans every step"),
        ({"states": True}, "auto", "while", "works here"),
        ({"mode": CUDAGraphMode.FULL_DECODE_ONLY}, "replay", "replay", "works here"),
    ],
)
def test_form_of_an_engine(engine: dict[str, Any], loop: str, form: str, words: str) -> None:
    chosen = choose(runner(**engine), loop)
    assert chosen.name == form
    assert words in chosen.reason


def test_no_while_node_no_while_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "no_while_reason", lambda: "needs the package cuda-bindings")
    form = choose(runner(), "auto")
    assert form == Form(LoopForm.REPLAY, "while: needs the package cuda-bindings")


def test_all_sizes_are_recorded_the_largest_first(machine: SimpleNamespace) -> None:
    store = graph_store(Form(LoopForm.REPLAY, ""))
    assert store.record(profile_only=False) == sum(SIZES) * STEP_BYTES
    assert machine.recorded == [("replay", size) for size in sorted(SIZES, reverse=True)]
    assert store.graphs is not None and store.graphs.form == "replay"
    assert sorted(machine.proved) == [("replay", min(SIZES)), ("replay", max(SIZES))]


def test_each_number_of_adapters_is_recorded(machine: SimpleNamespace) -> None:
    store = graph_store(Form(LoopForm.REPLAY, ""), cases=(0, 3))
    assert store.record(profile_only=False) == 2 * sum(SIZES) * STEP_BYTES
    assert machine.recorded[:2] == [("replay", max(SIZES))] * 2
    assert machine.adapters == [3, 0] * len(SIZES)


def test_memory_is_estimated_from_the_largest_and_nothing_kept(machine: SimpleNamespace) -> None:
    """8 + 4 rows are recorded, two more sizes are taken to need as much as the last one."""
    store = graph_store(Form(LoopForm.WHILE, ""))
    assert store.record(profile_only=True) == (8 + 4 + 2 * 4) * STEP_BYTES
    assert machine.recorded == [("while", 8), ("while", 4)]
    assert store.graphs is None and not machine.proved


def test_wrong_tokens_make_way(machine: SimpleNamespace) -> None:
    machine.wrong.add("while")
    store = graph_store(Form(LoopForm.WHILE, "works here"))
    store.record(profile_only=False)
    assert store.form == Form(LoopForm.REPLAY, "while: its tokens are not those of the eager loop")
    assert store.graphs is not None and store.graphs.form == "replay"


@pytest.mark.parametrize(
    ("broken", "asked", "form", "reason"),
    [
        ({"while"}, "while", "replay", "while: no while today"),
        ({"unrolled"}, "unrolled", "replay", "unrolled: no unrolled today"),
        ({"while", "replay"}, "while", "eager", "replay: no replay today"),
    ],
)
def test_a_form_that_fails_makes_way(
    machine: SimpleNamespace, broken: set[str], asked: str, form: str, reason: str
) -> None:
    machine.broken |= broken
    store = graph_store(Form(LoopForm(asked), "works here"))
    store.record(profile_only=False)
    assert store.form == Form(LoopForm(form), reason)
    assert (store.graphs is None) == (form == "eager")
    assert {name for name, _ in machine.recorded} == ({form} - {"eager"})


def test_a_backend_that_plans_on_the_host_has_no_graphs_of_ours(machine: SimpleNamespace) -> None:
    store = graph_store(Form(LoopForm.REPLAY, ""), in_place=(True, False))
    assert store.record(profile_only=False) == 0
    assert store.graphs is None and machine.recorded == []


def test_ranks_agree_on_the_form(machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank cannot record what this one can: both take the next form."""
    machine.group = SimpleNamespace(world_size=2, cpu_group="cpu")
    others = iter([0, 1])  # the other rank's answers

    def all_reduce(answer: torch.Tensor, op: Any, group: str) -> None:
        assert group == "cpu"
        answer.clamp_(max=next(others))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    store = graph_store(Form(LoopForm.UNROLLED, "works here"))
    store.record(profile_only=False)
    assert store.form == Form(LoopForm.REPLAY, "unrolled: another rank could not")
    assert next(others, None) is None


@pytest.mark.parametrize("max_num_reqs", [5, 8, 100])
def test_no_more_rows_than_requests(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, max_num_reqs: int
) -> None:
    """Of cudagraph_mode FULL, whose sizes go beyond the number of requests."""
    store = graph_store(Form(LoopForm.REPLAY, ""))
    store.runner.max_num_reqs = max_num_reqs
    sizes = [num_rows for num_rows, _ in store._batches()]
    assert max(sizes) == min(max_num_reqs, max(SIZES)) and sizes == sorted(sizes, reverse=True)
    assert padded_rows(SimpleNamespace(num_tokens=104), 100) == 100


def test_batches_above_the_full_graphs_are_recorded(
    machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten rows: vLLM's graph for nine or ten is a piecewise one of 16 tokens."""
    monkeypatch.setitem(globals(), "PIECES", (16,))
    store = graph_store(Form(LoopForm.REPLAY, ""))
    store.record(profile_only=False)
    assert [num_rows for _, num_rows in machine.recorded] == [10, 8, 4, 2, 1]


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({}, None),
        ({"mode": CUDAGraphMode.NONE}, None),
        ({"mode": CUDAGraphMode.PIECEWISE}, None),
        ({"in_place": (True, False)}, None),
        ({"in_place": (False,), "name": "FLASHINFER"}, "planned on the host by FLASHINFER"),
        ({"in_place": (False,), "name": "FLASHINFER", "device": "cpu"}, None),
        ({"in_place": (True,), "name": "FLASHINFER"}, None),
        # Each round is planned again.
        ({"name": "FLASHINFER", "drafter": "OTHER_ATTN"}, "planned on the host by FLASHINFER"),
        ({"drafter": "FLASHINFER"}, "planned on the host by FLASHINFER"),
        ({"drafter": "OTHER_ATTN"}, None),
    ],
)
def test_engines_that_keep_stock_steps(engine: dict[str, Any], words: str | None) -> None:
    """Where windows would be wrong."""
    reason = forms.no_windows_reason(runner(**engine))
    assert reason is None if words is None else words in str(reason)

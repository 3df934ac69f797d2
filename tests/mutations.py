"""Faults of the CUDA path that were repaired: how to put each back, and the test that fails then.

``test_mutations.py`` does it, in a copy of the tree; docs/stand-in.md lists them.
"""

from __future__ import annotations

from dataclasses import dataclass

ENGINE = "standin/test_engine.py"
WINDOW = "standin/test_window.py"
RUNNER = "standin/test_runner.py"
FORMS = "test_forms.py"
DRIVER = "libcuda/test_driver.py"
ROUNDS = "engine/test_speculation.py"


@dataclass(frozen=True)
class Mutation:
    """In ``path`` the text ``old``, which is there once, becomes ``new``: ``test`` must fail."""

    fault: str  # as in the table of docs/stand-in.md
    path: str
    old: str
    new: str
    test: str  # a file in tests
    name: str  # a part of the names of its tests
    may_hang: bool = False  # a request that never ends shows it, too
    quick: bool = False  # in every run of the tests

    @property
    def id(self) -> str:
        module = self.path.rpartition("/")[2].removesuffix(".py")
        test = self.test.rpartition("/")[2].removesuffix(".py")
        return f"{module}-{self.old.split()[0].strip('@(')}-{test}-{self.name}"


STALE = "stock steps sampled from parameters of the row's last user"
STREAMS = "a stream for each recording of a WHILE body"
INFERENCE = "recording outside inference mode"
DEVICES = "pinned buffers on the default device; a device without index"
SCRATCH = "the sampler's scratch outside vLLM's memory profile, made twice"
SPINS = "waits that keep a core busy"
NO_GRAPHS = "windows without graphs where vLLM's steps have some"
FIRST_ERROR = "the first error hides behind the next one"
BELOW = "blocks below a sliding window, which others may write, with a NaN"
CAPTURE = "vLLM's last capture still runs when the first request comes"
MODULES = "the driver's module kept when its kernel is not found"

SLOTS = "a slot's output or staging used for the window after it"
READS = "a result that is read before its copy is waited for"
COPIES = "a result that is copied before the steps have run"
DRAFTS = "a recorded draft model that reads another round's tokens, or none"
WHOLE = "a recorded round that reads another's drafts, seed, penalties or number, or has no end"
HEAD = "a recorded head that reads no hidden states, or another row's token"
STATE = "fusedstep/window/state.py"
OUTPUT = "fusedstep/window/host_copies.py"
RECORDER = "fusedstep/window/recorder.py"
DECODE_MODEL = "fusedstep/vllm_plugin/runner/decode_model.py"
RECORDING = "fusedstep/vllm_plugin/runner/recording.py"
DRAFTER_PY = "fusedstep/vllm_plugin/runner/drafter.py"
ROUNDS_PY = "fusedstep/vllm_plugin/runner/rounds.py"
HEAD_PY = "fusedstep/vllm_plugin/runner/head_drafter.py"
RECORDED_PY = "fusedstep/vllm_plugin/runner/recorded_rounds.py"
RUNNER_PY = "fusedstep/vllm_plugin/runner/runner.py"

MUTATIONS = (
    Mutation(
        STALE,
        "fusedstep/vllm_plugin/runner/tables.py",
        "            tensor.copy_to_uva()\n        self.static.refresh()\n",
        "            tensor.copy_to_uva()\n",
        "standin/test_copies.py",
        "host_s_memory",
        may_hang=True,
    ),
    *(
        Mutation(
            STREAMS,
            RECORDER,
            "body_stream = self._stream_beside(stream)",
            "body_stream = torch.cuda.Stream(self._device)",
            WINDOW,
            name,
        )
        for name in ("more_recordings", "same_memory")
    ),
    *(
        Mutation(
            INFERENCE,
            RUNNER_PY,
            f"@torch.inference_mode()\n    def {name}(",
            f"def {name}(",
            RUNNER,
            "recording_is_inference",
        )
        for name in ("capture_model", "use_form")
    ),
    Mutation(
        DEVICES,
        "fusedstep/window/pinned.py",
        'device="cpu", pin_memory=pinned',
        "pin_memory=pinned",
        WINDOW,
        "host_buffers",
    ),
    Mutation(
        DEVICES,
        RECORDER,
        "self._device = torch.device(device.type, index)",
        "self._device = device",
        WINDOW,
        "same_memory",
    ),
    Mutation(
        SCRATCH,
        RUNNER_PY,
        "self._step_class()\n            self._allocate_grammars()",
        "self._allocate_grammars()",
        RUNNER,
        "scratch",
    ),
    Mutation(
        SCRATCH,
        RUNNER_PY,
        "self._step_class()\n            self._allocate_grammars()",
        "self._allocate_grammars()",
        ENGINE,
        "test_start",
    ),
    Mutation(
        SCRATCH,
        RUNNER_PY,
        "if self.scratch is None:",
        "if self.scratch or True:",
        RUNNER,
        "scratch",
    ),
    Mutation(
        "the arrivals' page replaced while the driver knows it",
        RUNNER_PY,
        'if not hasattr(self, "arrivals"):',
        'if hasattr(self, "arrivals") or True:',
        RUNNER,
        "one_page",
    ),
    *(
        Mutation(fault, path, old, new, test, "test_tokens")
        for fault, path, old, new, tests in (
            (SLOTS, STATE, "self.slots[self._count % 2]", "self.slots[0]", [WINDOW]),
            (
                SLOTS,
                STATE,
                "(slot(), slot())",
                "(first := slot(), WindowSlot(rows, seen, slot().output, first.staging))",
                [WINDOW, ENGINE],
            ),
            (READS, OUTPUT, "self._ready.synchronize()", "pass", [WINDOW, ENGINE]),
            (
                COPIES,
                OUTPUT,
                "stream.wait_stream(torch.cuda.current_stream())",
                "pass",
                [WINDOW, ENGINE],
            ),
        )
        for test in tests
    ),
    *(
        Mutation(fault, path, old, new, ROUNDS, "test_on_the_stand_in", may_hang=True)
        for fault, path, old, new in (
            (SLOTS, ROUNDS_PY, "self.outputs[self.output is self.outputs[0]]", "self.outputs[0]"),
            (READS, OUTPUT, "self._ready.synchronize()", "pass"),
            (COPIES, OUTPUT, "stream.wait_stream(torch.cuda.current_stream())", "pass"),
        )
    ),
    *(
        Mutation(DRAFTS, DRAFTER_PY, old, new, ROUNDS, "test_on_the_stand_in")
        for old, new in (
            ("self.back[:num_reqs] = verified.num_tokens", "pass"),
            ("graph.replay()", "pass"),
        )
    ),
    *(
        Mutation(WHOLE, path, old, new, ROUNDS, "test_whole_rounds", may_hang=True)
        for path, old, new in (
            (RECORDED_PY, "rounds.drafts[:num_rows] = rounds", "rounds"),
            (RECORDED_PY, "self.of_tokens[:num_rows].copy_(batch.idx_mapping[:, None])", "pass"),
            (RECORDED_PY, "rounds.taken.number >= rows.steps_allowed[:1]", "rows.num_active < 0"),
            (RECORDED_PY, "if needs.adjustment:", "if needs.grammar:"),
            (ROUNDS_PY, "self.taken.begin()", "pass"),
        )
    ),
    *(
        Mutation(HEAD, path, old, new, ROUNDS, "test_heads", may_hang=True)
        for path, old, new in (
            (HEAD_PY, "speculator.hidden_states[: len(hidden_states)].copy_(hidden", "(hidden"),
            (
                HEAD_PY,
                "num_rejected = 1 + self.num_drafts - num_tokens",
                "num_rejected = 0 * num_tokens",
            ),
            (RECORDED_PY, "replace(batch, query_start_loc=rounds.starts[: num_reqs + 1])", "batch"),
        )
    ),
    Mutation(
        SPINS,
        OUTPUT,
        "torch.cuda.Event(blocking=True)",
        "torch.cuda.Event()",
        WINDOW,
        "host_buffers",
    ),
    Mutation(
        SPINS,
        "fusedstep/window/pace.py",
        "torch.cuda.Event(blocking=True)",
        "torch.cuda.Event()",
        WINDOW,
        "host_buffers",
    ),
    *(
        Mutation(
            NO_GRAPHS,
            RECORDING,
            "if graph.cg_mode != CUDAGraphMode.NONE:",
            "if graph.cg_mode == CUDAGraphMode.FULL:",
            test,
            name,
        )
        for test, name in ((FORMS, "above_the_full_graphs"), (ENGINE, "no_capture_size"))
    ),
    *(
        Mutation(NO_GRAPHS, DECODE_MODEL, old, new, ENGINE, "no_capture_size")
        for old, new in (
            (
                "if graph.cg_mode != CUDAGraphMode.NONE:",
                "if graph.cg_mode == CUDAGraphMode.FULL:",
            ),
            (
                "self.graph, self.num_tokens = graph, graph.num_tokens",
                "self.num_tokens = min(graph.num_tokens, runner.max_num_reqs)",
            ),
        )
    ),
    Mutation(
        "`cudagraph_mode=FULL` with sizes above `max_num_seqs`",
        DECODE_MODEL,
        "return min(int(graph.num_tokens), max_num_reqs)",
        "return int(graph.num_tokens)",
        FORMS,
        "no_more_rows",
    ),
    Mutation(
        "each `--loop` compiles the model again",
        "fusedstep/vllm_plugin/compile_cache.py",
        " for name, value in given.items() if name != OURS}",
        " for name, value in given.items()}",
        "test_compat.py",
        "key_of_compiled_models",
    ),
    Mutation(
        "a recording that fails stays open in torch's allocator",
        RECORDER,
        "torch._C._cuda_endAllocateToPool(self._device.index, pool)",
        "pass",
        WINDOW,
        "fails_is_over",
    ),
    Mutation(
        "one nondeterministic kernel costs both graph forms",
        "fusedstep/window/proof.py",
        "if not self._varies(eager, num_reqs, needs):",
        "if True:",
        "window/test_proof.py",
        "varies",
        quick=True,
    ),
    Mutation(
        "FlashInfer takes an upper bound for a length",
        RECORDING,
        "if planners & reasons.PLAN_FROM_BOUND:",
        "if False:",
        FORMS,
        "keep_stock_steps",
    ),
    Mutation(
        BELOW,
        "fusedstep/ops/native_rows.py",
        "NULL_BLOCK_ID if i < num_below else block_table[req, i]",
        "block_table[req, i]",
        "ops/test_rows.py",
        "sliding_window",
    ),
    Mutation(
        BELOW,
        "fusedstep/ops/triton_step.py",
        '"SLIDING_REACH": self._sliding_reach',
        '"SLIDING_REACH": (0,) * len(self._block_sizes)',
        "ops/test_rows.py",
        "sliding_window",
    ),
    Mutation(
        BELOW,
        "fusedstep/vllm_plugin/runner/tables.py",
        "return int(window.sliding_window - 1 + window.extra_retained_tokens)",
        "return 0",
        "test_compat.py",
        "below_a_sliding_window",
    ),
    Mutation(
        "tensor-parallel ranks fall back each alone",
        RECORDING,
        "if not _all_ranks(failure is None):",
        "if failure is not None:",
        FORMS,
        "ranks_agree",
    ),
    Mutation(
        "a page that is unmapped stays registered",
        RECORDER,
        "weakref.finalize(arrivals, self._give_back, cuda.cuMemHostUnregister, address)",
        "weakref.finalize(torch, self._give_back, cuda.cuMemHostUnregister, address)",
        DRIVER,
        "registered_once",
    ),
    Mutation(
        CAPTURE,
        RUNNER_PY,
        "        torch.accelerator.synchronize()\n        return size",
        "        return size",
        RUNNER,
        "when_the_device_is_done",
    ),
    Mutation(
        FIRST_ERROR,
        RECORDER,
        "self._give_back(cuda.cuStreamEndCapture, body_stream)",
        "self._call(cuda.cuStreamEndCapture, body_stream)",
        DRIVER,
        "first_error",
    ),
    Mutation(
        FIRST_ERROR,
        RECORDER,
        "if first is not None and first is not error:",
        "if False:",
        DRIVER,
        "makes_way",
    ),
    Mutation(
        "an error that cuda-bindings does not know ends without the call's name",
        RECORDER,
        "except (KeyError, ValueError) as unknown:",
        "except ZeroDivisionError as unknown:",
        DRIVER,
        "do_not_know",
    ),
    Mutation(
        MODULES,
        RECORDER,
        "self._give_back(cuda.cuModuleUnload, module)",
        "pass",
        DRIVER,
        "makes_way",
    ),
    Mutation(
        "cuda-bindings 13 without edge data",
        RECORDER,
        "if driver.CUDA_VERSION >= 13000",
        "if driver.CUDA_VERSION >= 99000",
        DRIVER,
        "one_node",
    ),
    Mutation(
        "a WHILE node for a stream that records nothing",
        RECORDER,
        "if status != cuda.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE:",
        "if False:",
        DRIVER,
        "refused",
    ),
)

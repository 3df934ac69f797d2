"""The list of what we use of vLLM is complete, and every supported vLLM has what it lists."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from surface import check, wheel
from surface.reader import scan
from surface.tree import Tree
from surface.uses import Uses
from test_layers import MODULES

from fusedstep.vllm_plugin import compat
from fusedstep.vllm_plugin.launch import sources as launch

WHEEL = "0.33.0"  # the newest CUDA wheel; too large to install for a test
LIST = "surface.vllm_names"  # itself no use
SOURCES = {
    module: path.read_text(encoding="utf-8")
    for module, path in MODULES.items()
    if not module.startswith(LIST)
}


@pytest.fixture(scope="module")
def uses() -> Uses:
    return scan(SOURCES)


@pytest.fixture(scope="module")
def installed(uses: Uses) -> Tree:
    """The installed vLLM, all that is listed read."""
    tree = Tree(wheel.installed().read)
    list(check.missing(tree, wheel.installed().version, uses))
    return tree


@pytest.fixture(params=["installed", WHEEL])
def sources(request: pytest.FixtureRequest) -> Iterator[wheel.Sources]:
    if request.param == "installed":
        yield wheel.installed()
        return
    with wheel.wheel(request.param) as remote:
        yield remote


def fail(title: str, problems: Iterator[str]) -> None:
    if lines := sorted(problems):
        pytest.fail("\n  ".join([f"{title}:", *lines]), pytrace=False)


def test_the_newest_supported_vllm_is_looked_at() -> None:
    major, minor = compat.SUPPORTED[1]
    assert WHEEL.startswith(f"{major}.{minor - 1}.")


def test_every_use_is_listed(uses: Uses) -> None:
    fail("tests/surface/vllm_names.py lacks", check.unlisted(uses))


def test_every_line_is_used(uses: Uses) -> None:
    fail("tests/surface/vllm_names.py has too much", check.unused(uses))


def test_vllm_has_what_is_listed(sources: wheel.Sources, uses: Uses) -> None:
    """Fails too where the wheel cannot be read: a vLLM that nobody looked at may not fit."""
    try:
        problems = list(check.missing(Tree(sources.read), sources.version, uses))
    except wheel.IndexUnreachable as error:
        pytest.fail(str(error), pytrace=False)
    fail(f"vLLM {sources.version} does not fit", iter(problems))


def test_options_are_read_from_vllms_sources(
    monkeypatch: pytest.MonkeyPatch, sources: wheel.Sources
) -> None:
    """A mistyped option is refused before vLLM is imported: no way to add one may be overlooked."""
    monkeypatch.setattr(launch, "read", lambda path: sources.read(f"vllm/{path}") or "")
    read = launch.option_names.__wrapped__
    names = read(server=True)
    assert {"--port", "--uds", "--api-key", "--no-enable-log-requests"} <= names
    assert {"--max-model-len", "--tensor-parallel-size"} <= read(server=False) < names
    assert "--port" not in read(server=False)
    text = "".join(map(launch.read, launch.ENGINE_OPTIONS + launch.SERVER_OPTIONS))
    added = re.findall(r"add_argument\(\s*(\S*?)[,\n]", text)
    assert len(added) > 100
    assert {word for word in added if not word.startswith('"')} == {"*extra_flags"}
    parts = set(re.findall(r"(\w+)\.add_cli_args\(", text))
    assert parts == {"FrontendArgs", "AsyncEngineArgs", "EngineArgs"}
    fields = launch.sampling_fields.__wrapped__()
    assert {"temperature", "seed", "structured_outputs"} <= fields.keys()


def test_without_an_index_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(wheel, "CACHE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with wheel.wheel(WHEEL) as remote, pytest.raises(wheel.IndexUnreachable) as error:
        remote.read("vllm/envs.py")
    assert str(error.value).startswith(f"cannot read names.txt of vLLM {WHEEL}'s wheel from the")
    assert f"pip finds no wheel vllm=={WHEEL}" in str(error.value)
    assert "\n" not in str(error.value) and not list(tmp_path.rglob("*.py"))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from vllm.config import LoadConfig", "vllm.config.LoadConfig is not listed"),
        ("import vllm.tracing", "vllm.tracing is not listed"),
        ("KERNELS = 'vllm.v1.worker.gpu.warmup'", '"vllm.v1.worker.gpu.warmup" is not listed'),
        ("VARIABLE = 'VLLM_TARGET_DEVICE'", "variable VLLM_TARGET_DEVICE is not listed"),
        ("    runner.req_states.max_seq_len", "RequestState.max_seq_len is not listed"),
        ("    for group in runner.attn_groups: group.backend.full()", "full is not listed with"),
        ("    runner.get_model(skip=True)", "get_model is not listed with this call's"),
        ("    for r in (s.waiting or s.kv_holding_waiting): r.clear()", "clear is not listed with"),
    ],
)
def test_a_new_use_is_seen(source: str, found: str) -> None:
    if source.startswith(" "):
        source = (
            "from fusedstep.vllm_plugin.runner.runner import FusedStepRunner\n"
            "from fusedstep.vllm_plugin.scheduler.scheduler import FusedStepScheduler\n"
            f"def function(runner: FusedStepRunner, s: FusedStepScheduler) -> None:\n{source}"
        )
    problems = check.unlisted(scan(SOURCES | {"fusedstep.new": source}))
    (problem,) = (line for line in problems if line.startswith("fusedstep.new, line "))
    assert found in problem


@pytest.mark.parametrize(
    ("path", "old", "new", "problem"),
    [
        pytest.param(*case, id=case[-1].partition(": ")[2])
        for case in [
            ("v1/request.py", "", None, "vllm.v1.request.Request: not there"),
            (
                "v1/worker/gpu/states.py",
                "self.last_sampled_tokens",
                "self.last_tokens",
                "vllm.v1.worker.gpu.states.RequestState.last_sampled_tokens: not there",
            ),
            (
                "v1/worker/gpu/states.py",
                "self.prefill_len = UvaBackedTensor(",
                "self.prefill_len = StagedWriteTensor(",
                "vllm.v1.worker.gpu.states.RequestState.prefill_len: "
                "is a StagedWriteTensor, not a UvaBackedTensor",
            ),
            (
                "v1/core/sched/request_queue.py",
                "def peek_request(self)",
                "def peek_request(self, policy)",
                "vllm.v1.core.sched.request_queue.RequestQueue.peek_request: "
                "needs 'policy', which we do not pass",
            ),
            (
                "v1/worker/gpu/attn_utils.py",
                "    slot_mappings: torch.Tensor, kv_cache_config: KVCacheConfig\n",
                "    kv_cache_config: KVCacheConfig, slot_mappings: torch.Tensor\n",
                "vllm.v1.worker.gpu.attn_utils.build_slot_mappings_by_layer: "
                "parameter 1 is 'kv_cache_config', we pass 'slot_mappings'",
            ),
            (
                "v1/worker/gpu/sample/output.py",
                "    num_nans:",
                "    nans:",
                "vllm.v1.worker.gpu.sample.output.SamplerOutput: has no parameter 'num_nans'",
            ),
            (
                "v1/core/sched/scheduler.py",
                "def schedule(self, throttle_prefills: bool = False",
                "def schedule(self, throttle_prefills: bool = False, step: int = 0",
                "vllm.v1.core.sched.async_scheduler.AsyncScheduler.schedule: "
                "has a parameter 'step', which our override does not take",
            ),
            (
                "v1/worker/gpu/model_runner.py",
                "    def finish_requests(",
                "    def decode_model(self): ...\n    def finish_requests(",
                "vllm.v1.worker.gpu.model_runner.GPUModelRunner.decode_model: "
                "our FusedStepRunner has this name too",
            ),
            (
                "v1/outputs.py",
                "class AsyncModelRunnerOutput(ABC):\n",
                "class AsyncModelRunnerOutput(ABC):\n"
                "    @abstractmethod\n    def wait(self): ...\n",
                "vllm.v1.outputs.AsyncModelRunnerOutput.wait: abstract, our WindowOutput lacks it",
            ),
            (
                "v1/worker/cpu/model_runner.py",
                "    def warming_up_model(",
                "    def cool_down(self): ...\n    def warming_up_model(",
                "vllm.v1.worker.cpu.model_runner.CPUModelRunner: "
                "has a method 'cool_down', which our replacement does not know",
            ),
            (
                "v1/worker/gpu/sample/min_p.py",
                "    logits_stride,\n",
                "    logits_stride,\n    rows,\n",
                "vllm.v1.worker.gpu.sample.min_p._min_p_kernel: "
                "has a parameter 'rows', which our stand-in does not know",
            ),
            (
                "v1/engine/core.py",
                "EngineCore failed to start",
                "EngineCore did not start",
                'vllm.v1.engine.core: does not say "EngineCore failed to start"',
            ),
        ]
    ],
)
def test_a_change_in_vllm_is_seen(
    installed: Tree, uses: Uses, path: str, old: str, new: str | None, problem: str
) -> None:
    def read(name: str) -> str | None:
        text = installed.read(name)
        if name != f"vllm/{path}" or text is None:
            return text
        assert old in text
        return None if new is None else text.replace(old, new)

    changed = Tree(read)
    module = f"vllm/{path}".removesuffix(".py").replace("/", ".")
    changed.modules = {name: m for name, m in installed.modules.items() if name != module}
    changed.classes = {
        definition: members
        for definition, members in installed.classes.items()
        if module not in {definition.module, *(member.module for member in members.values())}
    }
    assert problem in set(check.missing(changed, wheel.installed().version, uses))

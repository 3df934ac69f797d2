"""The WHILE node's calls of the CUDA driver, through both kinds of cuda-bindings, on a stub of it.

``stub.c`` stands for libcuda and is as strict as it is; ``setup_env.py`` installs the bindings.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
from libcuda import child, stub

from fusedstep.window.graphs import VARIANTS

# Of one node, in order; those that have another form where they take edge data with "_v".
ONE_NODE = [
    "cuCtxGetCurrent",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuMemHostRegister",
    "cuMemHostGetDevicePointer",
    "cuStreamGetCaptureInfo_v",
    "cuGraphConditionalHandleCreate",
    "cuGraphAddNode_v",
    "cuStreamUpdateCaptureDependencies_v",
    "cuStreamBeginCaptureToGraph",
    "cuLaunchKernel",
    "cuStreamEndCapture",
]
NAMES = [name.removesuffix("_v") for name in ONE_NODE]
AT_START = NAMES[:5]  # once for all recordings
CUDA_ERROR_ILLEGAL_STATE, UNHEARD_OF = 401, 12345


@pytest.fixture(scope="module", params=stub.BINDINGS, ids=lambda major: f"cuda-bindings-{major}")
def major(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


@pytest.fixture(scope="module")
def driver(major: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Calls a function of ``child.py`` in a process that has the stub and these bindings."""
    if (reason := stub.missing(major)) is not None:
        pytest.skip(reason)
    library = stub.compiled(tmp_path_factory.mktemp("libcuda"))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, child.begin, (library, stub.BINDINGS[major])) as process:

        def call(function: Any, *args: Any) -> Any:
            return process.submit(function, *args).result(timeout=600)

        assert call(child.version) // 1000 == major
        yield call


def of_version(calls: list[str], major: int) -> list[str]:
    """With the forms of the calls that these bindings ask the driver for."""
    with_edges = {12: ("v2", "v1"), 13: ("v3", "v2")}[major]  # of the capture's info, of the others
    return [
        name.removesuffix("v") + with_edges[not name.startswith("cuStreamGet")]
        if name.endswith("_v")
        else name
        for name in calls
    ]


def test_one_node(driver: Any, major: int) -> None:
    """Tuples, edge data, parameters and arguments are what the driver takes."""
    found = driver(child.one_node)
    assert found["calls"] == of_version(ONE_NODE, major)
    assert found["arguments"] == found["given"]
    assert found["ended"] == 0 and found["left"] == {"modules": 1, "pages": 1, "captures": 0}


def test_pages_are_registered_once_and_given_back(driver: Any) -> None:
    assert driver(child.pages) == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("stream", "body_stream", "recorded", "words"),
    [
        (1, 2, (1, 2), "cuStreamBeginCaptureToGraph: CUDA_ERROR_ILLEGAL_STATE"),
        (1, 1, (1,), "cuStreamBeginCaptureToGraph: CUDA_ERROR_ILLEGAL_STATE"),
        (1, 0, (1,), "cuStreamBeginCaptureToGraph: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"),
        (1, 2, (), "cuStreamGetCaptureInfo: CU_STREAM_CAPTURE_STATUS_NONE, the stream does not"),
    ],
    ids=["body-recorded", "same", "default", "nothing-recorded"],
)
def test_streams_that_are_refused(
    driver: Any, stream: int, body_stream: int, recorded: tuple[int, ...], words: str
) -> None:
    assert driver(child.refused, stream, body_stream, recorded).startswith(words)


@pytest.mark.parametrize("code", [CUDA_ERROR_ILLEGAL_STATE, UNHEARD_OF])
def test_the_first_error_is_told(driver: Any, code: int) -> None:
    """Not that the recording cannot be ended after it."""
    assert driver(child.first_error, code) == {"error": "the body's own", "ended": 0, "left": 0}


def test_tokens(driver: Any) -> None:
    """The condition reads the addresses that it was given: an arrival ends the first window."""
    found = driver(child.tokens)
    assert found["same"]
    assert found["steps"][:2] == [1, 16]
    assert found["calls"].count("cuLaunchKernel") == len(VARIANTS)


def test_without_a_failure_the_form_stays(driver: Any) -> None:
    found = driver(child.form_after, None, 0, 0)
    assert (found["form"], found["reason"]) == ("while", "works here")
    assert not [line for line in found["calls"] if "another call" in line or "refused" in line]
    assert_nothing_leaks(found)
    assert found["modules"] == 1  # as long as graphs may run its kernel


@pytest.mark.parametrize(
    ("call", "after"),
    [(call, after) for after in (0, 1) for call in NAMES if not after or call not in AT_START],
)
def test_a_call_that_fails_makes_way(driver: Any, call: str, after: int) -> None:
    """At the first recording, or at the second, when there is a graph of this form already."""
    found = driver(child.form_after, call, CUDA_ERROR_ILLEGAL_STATE, after)
    assert (found["form"], found["recorded"]) == ("replay", True)
    assert found["reason"] == f"while: {call}: CUDA_ERROR_ILLEGAL_STATE"
    assert_nothing_leaks(found)
    assert found["modules"] == (call not in AT_START[:3])


def test_an_error_that_the_bindings_do_not_know(driver: Any) -> None:
    found = driver(child.form_after, "cuGraphAddNode", UNHEARD_OF, 0)
    assert found["form"] == "replay"
    assert found["reason"].startswith("while: cuGraphAddNode: ") and "12345" in found["reason"]
    assert_nothing_leaks(found)


def assert_nothing_leaks(found: dict[str, Any]) -> None:
    """No stream is recorded for the driver, torch or its allocator; no page is registered."""
    left = {name: found[name] for name in ("captures", "streams", "unfinished", "pages")}
    assert not any(left.values()), left

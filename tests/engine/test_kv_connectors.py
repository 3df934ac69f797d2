"""An engine that decodes behind one that prefills: KV caches of prompts come by a KV connector.

Stock Model Runner V2 with vLLM's ExampleConnector writes those of some prompts to files. Consumers,
stock and fusedstep, load them with the same connector (at once, before a step) or with ours of
``late_kv.py`` (they come some steps later).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import features_child
import kv_connectors_child
import pytest
import safetensors.torch
from engine_child import EngineChild
from features_child import OPTIONS, Ask

# vLLM's example knows no prompts in pieces; windows so short that requests come between them.
WHOLE = OPTIONS | {
    "max_num_batched_tokens": 512,
    "additional_config": {"fusedstep": {"decode_steps": 7}},
}
REMOTE = [[(7 * i + 11 * n) % 40000 + 10 for i in range(70 + 13 * n)] for n in range(4)]
LOCAL = [[(5 * i + 3 * n) % 40000 + 10 for i in range(20 + 30 * n)] for n in range(3)]
SEEDED = {"temperature": 1.0, "seed": 7}
LATE = "KV cache on its way"


def request(token_ids: list[int], length: int, at: int, **fields: Any) -> Ask:
    fields = {"max_tokens": length, "ignore_eos": True, **fields}
    return Ask({"prompt_token_ids": token_ids}, fields, at=at)


# Four places for seven requests: some wait, and come when others have ended.
ASKS = [
    request(LOCAL[0], 60, 0),
    request(REMOTE[0], 40, 0),
    request(REMOTE[1], 7, 0, **SEEDED),
    request(REMOTE[2], 33, 3),
    request(LOCAL[1], 50, 4, **SEEDED),
    request(REMOTE[3], 45, 6),
    request(LOCAL[2], 20, 9),
]


def connected(name: str, store: Path, role: str = "kv_consumer") -> dict[str, Any]:
    own = {} if name == "ExampleConnector" else {"kv_connector_module_path": "late_kv"}
    transfer = {
        "kv_connector": name,
        "kv_role": role,
        "kv_connector_extra_config": {"shared_storage_path": str(store)},
        "kv_load_failure_policy": "recompute",
    }
    return WHOLE | {"kv_transfer_config": transfer | own}


def tokens(result: dict[str, Any]) -> list[list[int]]:
    return [[list(c["token_ids"]) for c in answer] for answer in result["answers"]]


@pytest.fixture(scope="module")
def written(oracle: EngineChild, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the prefilling engine has written."""
    store = tmp_path_factory.mktemp("kv")
    producer = connected("ExampleConnector", store, "kv_producer")
    prefills = [request(token_ids, 1, 0) for token_ids in REMOTE]
    oracle.call(features_child.ask, tiny, producer, prefills)
    assert len(list(store.iterdir())) == len(REMOTE)
    return store


@pytest.fixture(scope="module")
def computed(oracle: EngineChild, tiny: str) -> list[list[int]]:
    """The answers without a connector."""
    return tokens(oracle.call(features_child.ask, tiny, WHOLE, ASKS))


@pytest.fixture
def compare_loads(
    oracle: EngineChild,
    fused: EngineChild,
    tiny: str,
    written: Path,
    computed: list[list[int]],
) -> Any:
    """Ask both with a copy each of what was written: vLLM's example writes what it has not.

    The copies lie where they lay before: tests of one connector share its two engines.
    """

    def compare(name: str, spoil: Any = None) -> dict[str, Any]:
        results = []
        for child, role in (oracle, "stock"), (fused, "fused"):
            store = written.with_name(f"{written.name}-{role}")
            shutil.rmtree(store, ignore_errors=True)
            shutil.copytree(written, store)
            if spoil is not None:
                spoil(store)
            results.append(child.call(features_child.ask, tiny, connected(name, store), ASKS))
        want, have = results
        assert tokens(have) == tokens(want)
        return have

    return compare


def turn_over(store: Path) -> None:
    """Other keys and values than were written."""
    for file in store.glob("*/*.safetensors"):
        kv = safetensors.torch.load_file(file)["kv_cache"]
        safetensors.torch.save_file({"kv_cache": kv.flip(0).contiguous()}, file)


def lose_a_layer(store: Path) -> None:
    for folder in sorted(store.iterdir())[:2]:
        next(folder.iterdir()).unlink()


@pytest.mark.parametrize(
    ("name", "reasons"),
    [("ExampleConnector", {"prefill"}), ("LateConnector", {"prefill", LATE})],
)
def test_windows_behind_a_prefilling_engine(
    compare_loads: Any, computed: list[list[int]], name: str, reasons: set[str]
) -> None:
    result = compare_loads(name)
    assert tokens(result) == computed
    counts = result["counts"]
    assert counts["steps"] > 2 * counts["windows"] > 0, counts
    assert set(counts["stock_steps"]) == reasons, counts


def test_what_was_loaded_is_what_is_read(compare_loads: Any, computed: list[list[int]]) -> None:
    """Keys and values that were spoilt give other tokens, to both the same."""
    spoilt = tokens(compare_loads("LateConnector", spoil=turn_over))
    same = [a == b for a, b in zip(spoilt, computed, strict=True)]
    assert same == [True, False, False, False, True, False, True]


def test_a_load_that_fails_is_computed_here(compare_loads: Any, computed: list[list[int]]) -> None:
    result = compare_loads("LateConnector", lose_a_layer)
    assert tokens(result) == computed


def test_a_window_tells_the_connector_that_it_begins_and_ends(
    fused: EngineChild, tiny: str, written: Path, computed: list[list[int]]
) -> None:
    """Loads that begin in windows come too; the control: no window tells it."""
    store = written.with_name(f"{written.name}-fused")
    shutil.rmtree(store, ignore_errors=True)
    shutil.copytree(written, store)
    args = tiny, connected("LateConnector", store), ASKS
    result = fused.call(kv_connectors_child.ask_with_loads_in_windows, *args, hooks=True)
    assert tokens(result) == computed and LATE not in result["counts"]["stock_steps"]
    with pytest.raises(AssertionError):
        fused.call(kv_connectors_child.ask_with_loads_in_windows, *args, hooks=False)

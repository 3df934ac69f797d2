"""Engines that hand KV caches of prompts to each other by a KV connector, in files.

Stock Model Runner V2 with the same connector is the oracle, of the tokens and of what is written.
vLLM's ExampleConnector writes in the step that computes a prompt, and loads at once, before a step;
those of ``late_kv.py`` write some steps after a request has ended, and load in the background.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import features_child
import kv_connectors_child
import pytest
import safetensors.torch
import torch
from engine_child import EngineChild
from features_child import CONFIG, OPTIONS, Ask, FeatureChild
from transformers import AutoModelForCausalLM, LlamaConfig

# vLLM's example knows no prompts in pieces; windows so short that requests come between them.
WHOLE = OPTIONS | {
    "max_num_batched_tokens": 512,
    "additional_config": {"fusedstep": {"decode_steps": 7}},
}
FEW = {"num_gpu_blocks_override": 12}  # so few that requests wait for them, or are preempted
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


UNDECODED = [replace(one, fields=one.fields | {"detokenize": False}) for one in ASKS]
# Asked of an engine that prefills for others, but for two that it answers itself.
PREFILLS = [
    request(LOCAL[0], 70, 0),
    *(request(token_ids, 1, 2 * n) for n, token_ids in enumerate(REMOTE)),
    request([2] * 50, 50, 3, **SEEDED),
    *(request([n + 3] * 70, 3, 9 + n) for n in range(4)),  # they take the blocks that get free
]


def connected(name: str, store: Path, role: str = "kv_consumer") -> dict[str, Any]:
    own = {} if name == "ExampleConnector" else {"kv_connector_module_path": "late_kv"}
    transfer = {
        "kv_connector": name,
        "kv_role": role,
        "kv_connector_extra_config": {"shared_storage_path": str(store)},
        "kv_load_failure_policy": "recompute",
    }
    blocks = {} if role == "kv_consumer" else FEW
    return WHOLE | blocks | {"kv_transfer_config": transfer | own}


def tokens(result: dict[str, Any]) -> list[list[int]]:
    return [[list(c["token_ids"]) for c in answer] for answer in result["answers"]]


def files(store: Path) -> dict[str, Any]:
    """What was written: tensors by the names of their files."""
    found = {str(f.relative_to(store)): f for f in store.glob("*/*.safetensors")}
    return {n: safetensors.torch.load_file(f)["kv_cache"] for n, f in found.items()}


def other_files(store: Path, expected: Path) -> set[str]:
    """Files with other keys or values; in float32, but other batches were computed."""
    have, want = files(store), files(expected)
    both = have.keys() & want.keys()
    return {name for name in both if not torch.allclose(have[name], want[name], atol=1e-5)}


@pytest.fixture(scope="module")
def written(oracle: EngineChild, tiny: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a stock engine has written that prefills, and decodes some requests beside."""
    store = tmp_path_factory.mktemp("kv")
    producer = connected("SendingConnector", store, "kv_producer")
    oracle.call(kv_connectors_child.ask_and_send, tiny, producer, PREFILLS)
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


def assert_windows(result: dict[str, Any], stock_steps: set[str]) -> None:
    counts = result["counts"]
    assert counts["steps"] > 2 * counts["windows"] > 0, counts
    assert set(counts["stock_steps"]) == stock_steps, counts


def turn_over(store: Path) -> None:
    """Other keys and values than were written."""
    for file in store.glob("*/*.safetensors"):
        kv = safetensors.torch.load_file(file)["kv_cache"]
        safetensors.torch.save_file({"kv_cache": kv.flip(0).contiguous()}, file)


def lose_a_layer(store: Path) -> None:
    for folder in sorted(store.iterdir())[:2]:
        next(folder.iterdir()).unlink()


def test_windows_behind_a_prefilling_engine(compare_loads: Any, computed: list[list[int]]) -> None:
    result = compare_loads("LateConnector")
    assert tokens(result) == computed
    assert_windows(result, {"prefill", LATE})


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


def test_windows_of_an_engine_that_prefills(
    fused: EngineChild, tiny: str, written: Path, tmp_path: Path
) -> None:
    """Blocks of a request that has ended stay as they are until they are sent; the control: they
    get free at once, and others write to them."""
    store = tmp_path / "kv"
    producer = connected("SendingConnector", store, "kv_producer")
    result = fused.call(kv_connectors_child.ask_and_send, tiny, producer, PREFILLS)
    assert_windows(result, {"prefill"})
    assert files(store).keys() == files(written).keys() != set()
    assert not other_files(store, written)
    shutil.rmtree(store)
    fused.call(kv_connectors_child.ask_and_send, tiny, producer, PREFILLS, keep=False)
    assert other_files(store, written)


def test_windows_of_an_engine_that_stores_and_loads(
    oracle: EngineChild, fused: EngineChild, tiny: str, computed: list[list[int]], tmp_path: Path
) -> None:
    """First it computes and writes all prompts, then loads all; requests are preempted in both."""
    stores = tmp_path / "stock", tmp_path / "fused"
    children = list(zip((oracle, fused), stores, strict=True))
    for phase in "computed", "loaded":
        want, have = (
            child.call(features_child.ask, tiny, connected("ExampleConnector", s, "kv_both"), ASKS)
            for child, s in children
        )
        assert tokens(have) == tokens(want) == computed, phase
        assert have["preemptions"] > 0 and want["preemptions"] > 0
        assert_windows(have, {"prefill"})
    assert files(stores[0]).keys() == files(stores[1]).keys() != set()
    assert not other_files(*stores)
    for store in stores:
        turn_over(store)
    want, have = (
        child.call(features_child.ask, tiny, connected("ExampleConnector", s, "kv_both"), ASKS)
        for child, s in children
    )
    assert tokens(have) == tokens(want) != computed


def swap_ranks(store: Path) -> None:
    """Each rank's files are the other's."""
    for second in store.glob("*/*.1.safetensors"):
        first = second.with_name(second.name.removesuffix(".1.safetensors") + ".safetensors")
        first.rename(kept := second.with_suffix(".kept"))
        second.rename(first)
        kept.rename(second)


@pytest.mark.exhaustive
def test_tensor_parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of two ranks sends and loads keys of its own heads; the control: of the other's.

    ``pytest -m exhaustive tests/engine/test_kv_connectors.py``: minutes.
    """
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    torch.manual_seed(0)
    config = LlamaConfig(**CONFIG | {"num_key_value_heads": 2})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    sends = kv_connectors_child.ask_and_send
    stores, phases = (tmp_path / "stock", tmp_path / "fused"), []
    for switch, store in zip(("oracle", "on"), stores, strict=True):
        options = connected("SendingConnector", store, "kv_both")
        options |= {"tensor_parallel_size": 2, "skip_tokenizer_init": True}
        options.pop("structured_outputs_config")
        child = FeatureChild(switch)
        try:
            args = str(tmp_path / "model"), options, UNDECODED
            computed, loaded = child.call(sends, *args), child.call(sends, *args)
            swap_ranks(store)
            phases.append((computed, loaded, child.call(sends, *args)))
        finally:
            child.close()
    for want, have in list(zip(*phases, strict=True))[:2]:  # who is preempted computes it all anew
        assert tokens(have) == tokens(want)
    computed, loaded, swapped = phases[1]
    assert tokens(loaded) == tokens(computed) != tokens(swapped)
    assert_windows(computed, {"prefill"})
    assert_windows(loaded, {"prefill", LATE})
    assert files(stores[0]).keys() == files(stores[1]).keys()
    assert any(name.endswith(".1.safetensors") for name in files(stores[1]))
    assert not other_files(*stores)

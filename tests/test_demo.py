"""The bundled model: conversion, cache folder, tokenizer, and that it speaks English."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusedstep import demo
from fusedstep.bench import pair
from fusedstep.errors import ConfigError


@pytest.fixture
def fake_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, int]:
    """``demo_model`` with a tiny stand-in for the conversion, in a cache of its own."""
    source = tmp_path / "source.gguf"
    source.write_bytes(b"weights")
    calls = {"conversions": 0}

    def convert(gguf_path: Path, folder: Path, progress: demo.Progress) -> None:
        calls["conversions"] += 1
        progress(1, 2)
        (folder / "model.safetensors").write_bytes(gguf_path.read_bytes())
        progress(2, 2)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo, "find_gguf", lambda: source)
    monkeypatch.setattr(demo, "GGUF_SHA256", demo._sha256(source))
    monkeypatch.setattr(demo, "convert_gguf", convert)
    return calls


def _left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if path != folder]


def test_made_once(fake_model: dict[str, int]) -> None:
    seen: list[tuple[int, int]] = []
    folder = demo.demo_model(lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert demo.demo_model() == folder
    assert fake_model["conversions"] == 1
    assert _left_over(folder) == []


@pytest.mark.parametrize("damage", ["truncated", "missing", "no-manifest", "bad-manifest"])
def test_damaged_folder_is_made_again(fake_model: dict[str, int], damage: str) -> None:
    folder = demo.demo_model()
    if damage == "truncated":
        (folder / "model.safetensors").write_bytes(b"w")
    elif damage == "missing":
        (folder / "model.safetensors").unlink()
    elif damage == "no-manifest":
        (folder / demo.MANIFEST).unlink()
    else:
        (folder / demo.MANIFEST).write_text("[]")
    assert demo.find_made() is None
    assert demo.demo_model() == folder
    assert demo.find_made() == folder
    assert fake_model["conversions"] == 2
    assert _left_over(folder) == []


def test_concurrent_makers_agree(
    fake_model: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(4)
    write_manifest = demo._write_manifest

    def write_and_wait(folder: Path) -> None:
        write_manifest(folder)
        together.wait(timeout=30)

    monkeypatch.setattr(demo, "_write_manifest", write_and_wait)
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(demo.demo_model())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake_model["conversions"] == 4
    assert len(folders) == 4 and len(set(folders)) == 1
    assert demo.find_made() == folders[0]
    assert _left_over(folders[0]) == []


def test_failed_conversion_leaves_nothing(
    fake_model: dict[str, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(gguf_path: Path, folder: Path, progress: demo.Progress) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(demo, "convert_gguf", fail)
    with pytest.raises(ConfigError, match=r"No space left on device.*XDG_CACHE_HOME"):
        demo.demo_model()
    assert list((tmp_path / "cache" / "fusedstep").iterdir()) == []


def test_unknown_file_is_refused(
    fake_model: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ConfigError, match="not the known file"):
        demo.demo_model()
    assert fake_model["conversions"] == 0


@pytest.mark.parametrize("missing", ["package", "converter"])
def test_missing_extra_says_what_to_install(
    fake_model: dict[str, int], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    if missing == "package":
        monkeypatch.setattr(demo, "find_gguf", lambda: None)
    else:
        monkeypatch.setattr(demo, "can_convert", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'fusedstep\[demo\]'"):
        demo.demo_model()


@pytest.mark.parametrize(("num_heads", "head_size", "hidden"), [(1, 2, 1), (3, 8, 5), (9, 64, 576)])
def test_unpermute_undoes_llama_cpp(num_heads: int, head_size: int, hidden: int) -> None:
    rows = num_heads * head_size
    weight = np.arange(rows * hidden).reshape(rows, hidden)
    # LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py
    permuted = weight.reshape(num_heads, 2, head_size // 2, hidden).swapaxes(1, 2)
    restored = demo._unpermute(permuted.reshape(rows, hidden), num_heads)
    np.testing.assert_array_equal(restored, weight)


@pytest.fixture(scope="module")
def model_folder() -> Path:
    """The real bundled model, from the user's cache."""
    return demo.demo_model()


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)


def test_folder_is_whole(model_folder: Path) -> None:
    manifest = json.loads((model_folder / demo.MANIFEST).read_text())
    assert set(manifest["files"]) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name, entry in manifest["files"].items():
        assert demo._sha256(model_folder / name) == entry["sha256"]


@pytest.mark.parametrize(
    "text",
    [
        "The capital of France is Paris.",
        " leading and trailing ",
        "def f(x):\n\treturn x ** 2  # 1234567890\n\n\n",
        "Größe, naïveté, 東京, Москва, \U0001f680\U0001f469\u200d\U0001f4bb",
        "don't we'll I'm <b>tags</b> a\r\nb\x00c",
        "",
    ],
    ids=["plain", "spaces", "code", "unicode", "odd", "empty"],
)
def test_tokenizer_round_trip(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_gives_known_ids(tokenizer: Any) -> None:
    # What llama.cpp makes of the same GGUF file.
    expected = [788, 216, 34, 32, 34, 38, 357, 506, 216, 35, 30, 37, 6381, 17]
    assert tokenizer.encode("In 2026 it's 3.5 km!") == expected
    assert tokenizer.encode("<|im_start|>user") == [1, 4093]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == 49152


def test_chat_template(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_model_speaks_english(model_folder: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


def test_the_pair_s_tokenizer_knows_every_byte(tmp_path: Path) -> None:
    """Whatever a grammar lets through can be written."""
    from transformers import AutoTokenizer

    pair.make(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "alone")
    text = "".join(map(chr, range(1, 0x180))) + "\N{GRINNING FACE}"
    token_ids = tokenizer.encode(text)
    assert len(token_ids) == len(text.encode())
    assert tokenizer.decode(token_ids) == text
    assert len(tokenizer) == pair.CONFIG["vocab_size"]

"""``--images`` of ``verify`` and ``bench latency``: errors before engines, and a tiny model.

The marker ``exhaustive`` takes a minute:
.venv/bin/pytest -m exhaustive tests/engine/test_cli_images.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_vlms
from PIL import Image
from tiny_commands import SMALL, run

from fusedstep.bench import images
from fusedstep.bench.prompts import Request
from fusedstep.errors import ConfigError


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number, (name, size) in enumerate({"a.png": (64, 96), "b.JPG": (96, 64)}.items()):
        pixels = Image.effect_noise(size, 90).convert("RGB")
        pixels.putpixel((0, 0), (number, 0, 0))
        pixels.save(folder / name, format="PNG" if name == "a.png" else "JPEG")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_vlms.make("qwen25_vl", tmp_path_factory.mktemp("vlm") / "qwen25_vl")


def test_files_and_folders(pictures: Path) -> None:
    a, b = pictures / "a.png", pictures / "b.JPG"
    assert images.find([pictures]) == (a, b)
    assert images.find([b, pictures]) == (b, a, b)
    assert images.find([]) == ()
    texts = [Request("x"), Request("y")]
    asked = images.beside(texts, [a, b, a])
    assert asked[:2] == texts
    assert [(r.prompt, r.image) for r in asked[2:]] == [("x", a), ("y", b), ("x", a)]
    assert [r.name for r in asked[1:3]] == ["y", "[a.png] x"]


def test_what_cannot_be_read_is_named(pictures: Path, tmp_path: Path) -> None:
    for path, words in (
        (tmp_path / "no.png", "No such file or directory"),
        (pictures / "notes.txt", "it is no image that Pillow reads"),
        (tmp_path, "holds no image"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            images.find([path])
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("command", [("verify",), ("bench", "latency")], ids=" ".join)
def test_an_unreadable_image_is_one_line_before_any_engine(
    command: tuple[str, ...], pictures: Path
) -> None:
    done = run(*command, "m", "--images", str(pictures / "notes.txt"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: --images: cannot read ") and done.stderr.count("\n") == 1


def test_a_model_that_takes_no_images_is_one_line(model: str, pictures: Path) -> None:
    """Known when the first engine has its configuration: nothing is loaded."""
    done = run("verify", model, "--limit", "1", "--images", str(pictures), *SMALL)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1
    assert "takes no images: leave it out" in errors[0]


@pytest.mark.exhaustive  # two engines of a minute
def test_verify(qwen: str, pictures: Path, tmp_path: Path) -> None:
    """Two images beside two texts, as stock vLLM answers them."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("w17 w33 w700 w5\nw1100 w23\n")
    report = tmp_path / "report.json"
    args = ("--prompts", str(prompts), "--images", str(pictures), "--max-tokens", "24")
    done = run("verify", qwen, *args, "--json", str(report), *SMALL)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(report.read_text())
    assert result["requests"] == 4 and result["different"] == 0
    assert [item["prompt"][:8] for item in result["items"]] == [
        *("w17 w33 ", "w1100 w2", "[a.png] ", "[b.JPG] "),
    ]
    assert result["steps_per_window_mean"] > 2
    assert set(result["stock_steps"]) == {"prefill"}


@pytest.mark.exhaustive
def test_bench_latency(qwen: str, pictures: Path, tmp_path: Path) -> None:
    """Both engines see the images: greedy tokens are equal."""
    report = tmp_path / "latency.json"
    lengths = ("--batch-size", "3", "--temperature", "0", "--input-len", "8", "--output-len", "16")
    args = (*lengths, "--repeats", "2", "--images", str(pictures), "--json", str(report))
    done = run("bench", "latency", qwen, *args, "--dtype", "float32", *SMALL)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(report.read_text())
    assert [row["same_tokens"] for row in result["rows"]] == [True, True]

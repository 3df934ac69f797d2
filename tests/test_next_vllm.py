"""Another vLLM's Python with the installed one's binaries: what tests/next_vllm.py lays out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import next_vllm
import pytest

from fusedstep.vllm_plugin import compat

METADATA = "Metadata-Version: 2.4\nName: vllm\nVersion: 9.9.1\n\nVersion: of the text\n"
FILES = {
    "vllm/__init__.py": "",
    "vllm/_C_gpu.abi3.so": "a CUDA library",
    "vllm-9.9.1.dist-info/METADATA": METADATA,
    "vllm-9.9.1.dist-info/RECORD": "",
}


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "vllm-9.9.1-cp38-abi3-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, text)
    return path


def test_its_python_and_our_binaries(wheel: Path, tmp_path: Path) -> None:
    folder = next_vllm.unpack(wheel, tmp_path / "vllm")
    installed = next_vllm.installed_vllm()
    names = {path.relative_to(installed).as_posix() for path in installed.rglob("*.so")}
    found = {path.relative_to(folder / "vllm").as_posix() for path in folder.rglob("*.so")}
    assert "_C.abi3.so" in names and found == names
    code = (
        "import vllm; from importlib.metadata import version; "
        "from fusedstep.vllm_plugin.compat import vllm_version; "
        "print(vllm.__file__, version('vllm'), vllm_version())"
    )
    env = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    init = folder / "vllm" / "__init__.py"
    assert done.stdout.split() == [str(init), "9.9.1+cpu", "9.9.1+cpu"], done.stderr


def test_what_it_requires_and_nobody_installed(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of NEEDED is put beside it, others are named; what is there is neither."""
    folder = next_vllm.unpack(wheel, tmp_path / "vllm")
    file = folder / "vllm-9.9.1+cpu.dist-info" / "METADATA"
    lines = ("numpy>=1", "no-such-one>=2", "for-gpus==1", "other; extra == 'x'")
    text = "".join(f"Requires-Dist: {line}\n" for line in lines)
    file.write_text(file.read_text().replace("\n\n", f"\n{text}\n", 1))
    asked: list[list[str]] = []
    monkeypatch.setattr(next_vllm, "NEEDED", ("no-such-one",))
    monkeypatch.setattr(next_vllm.subprocess, "run", lambda words, check: asked.append(words))
    assert next_vllm.bring(folder) == ["for-gpus"]
    (words,) = asked
    assert words[-3:] == ["--target", str(folder), "no-such-one>=2"]


@pytest.mark.parametrize(
    "words", ([], ["--help"], ["other.whl"], ["vllm-9.whl"], ["vllm-9-bad.whl"])
)
def test_what_cannot_be_done_is_one_line(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(next_vllm, "FOLDER", tmp_path / "vllm")
    (tmp_path / "vllm-9-bad.whl").write_text("no wheel")
    assert next_vllm.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("next_vllm: ") and error.count("\n") == 1


PASSES = "def test_one(): pass\n"
FAILS = "def test_two(): assert False\n"
BREAKS = "import nothing_of_that_name\n"


def told(name: str) -> str:
    """What the tests of this file are, where ``engine`` is made."""
    return f"tests/engine/test_{name}.py"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A record of another version, and files of the names that are put on record."""
    record = tmp_path / "tried.json"
    record.write_text(json.dumps({"0.31.0": {"equality": {"passed": 3, "failed": 0}}}))
    folder = tmp_path / "tests" / "engine"
    folder.mkdir(parents=True)
    for name, text in (("equality", PASSES), ("features", PASSES + FAILS), ("server", BREAKS)):
        (folder / f"test_{name}.py").write_text(text)
    monkeypatch.setattr(next_vllm, "TRIED", record)
    monkeypatch.setattr(next_vllm, "ROOT", tmp_path)
    monkeypatch.setattr(next_vllm, "TESTS", [str(tmp_path / told(n)) for n in compat.WHOLE])
    return record


def test_a_file_that_ran_whole_is_put_on_record(tree: Path) -> None:
    """By version, beside what is known; one that pytest could not collect has not run."""
    assert next_vllm.main(["installed"]) != 0
    known, version = json.loads(tree.read_text()), compat.vllm_version()
    assert version is not None and set(known) == {"0.31.0", version}
    found = {
        name: [ran[kind] for kind in ("passed", "failed", "skipped")]
        for name, ran in known[version].items()
    }
    assert found == {"equality": [1, 0, 0], "features": [1, 1, 0]}
    words = ["1 of features failed", "server not run"]
    assert compat.gaps(version, tree) == words and compat.gaps("0.31.7", tree)[0] != words[0]


@pytest.mark.parametrize(
    "words",
    (
        ["tests/engine/test_equality.py", "-k", "one"],
        ["tests/engine/test_equality.py::test_one"],
        ["tests/engine/test_equality.py", "tests/engine"],
    ),
    ids=("some", "one", "more"),
)
def test_what_did_not_run_whole_is_not(tree: Path, words: list[str]) -> None:
    before = tree.read_text()
    next_vllm.main(["installed", *words])
    assert json.loads(tree.read_text()) == json.loads(before)


def test_a_version_that_is_tried_is_in_range_meanwhile(tmp_path: Path) -> None:
    """And out of it if its tokens differed from stock's."""
    record = tmp_path / "tried.json"
    passed, failed = ({"equality": {"passed": 9, "failed": n}} for n in (0, 1))
    for tried, high in (({}, 99), (passed, 99), (failed, 33)):
        record.write_text(json.dumps({"0.32.1+cpu": passed, "0.98.0": tried}))
        assert compat.supported(record) == ((0, 32), (0, high))

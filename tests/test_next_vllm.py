"""Another vLLM's Python with the installed one's binaries: what tests/next_vllm.py lays out."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import next_vllm
import pytest

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

"""A torchvision for another torch: its Python part imports, in any program of the environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# As torchvision: it describes an operator that only its extension declares.
STAND_IN = """
import torch

@torch.library.register_fake("torchvision::nms")
def _(dets, scores, iou_threshold):
    return dets
"""


def run(code: str, folder: Path | None = None, **environment: str) -> subprocess.CompletedProcess:
    """The code in a new process, with ``folder`` before all else on its path."""
    path = "" if folder is None else f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", path + code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def other_build(tmp_path: Path) -> Path:
    """A torchvision whose extension is no library of this torch's."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    (package / "_C.so").write_bytes(b"\\x7fELF and no more")
    return tmp_path


def test_it_imports(other_build: Path) -> None:
    code = """
import torch, torchvision
try:
    torch.ops.torchvision.nms(torch.ones(1, 4), torch.ones(1), 0.5)
except NotImplementedError:
    print("declared, not there")
"""
    done = run(code, other_build)
    assert done.stdout == "declared, not there\n", done.stderr
    # The control: torch loads no plug-in, so nothing is declared.
    done = run(code, other_build, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert "operator torchvision::nms does not exist" in done.stderr


def test_an_extension_that_loads_declares_its_own(other_build: Path) -> None:
    code = """
import torch, torchvision
"""
    loads = "import torch; torch.ops.load_library = lambda path: print('loaded', path[-5:])\n"
    done = run(loads + code, other_build)
    assert done.stdout == "loaded _C.so\n"
    assert "operator torchvision::nms does not exist" in done.stderr  # a stand-in declares none


@pytest.mark.parametrize("cuda", [None, "13.0"])
def test_one_finder_and_none_beside_cuda(monkeypatch: pytest.MonkeyPatch, cuda: str) -> None:
    import torch

    from fusedstep.vllm_plugin.cpu.vision_operators import BeforeTorchvision, install

    monkeypatch.setattr(sys, "meta_path", [f for f in sys.meta_path if "Torchvision" not in str(f)])
    monkeypatch.setattr(torch.version, "cuda", cuda)
    install()
    install()
    assert sum(isinstance(f, BeforeTorchvision) for f in sys.meta_path) == (cuda is None)


def test_what_vllm_needs_of_the_installed_one() -> None:
    """Image processors of transformers, without vLLM and without fusedstep being imported."""
    done = run("from transformers import Qwen2VLImageProcessor as P; print(type(P()).__name__)")
    assert done.stdout == "Qwen2VLImageProcessor\n", done.stderr

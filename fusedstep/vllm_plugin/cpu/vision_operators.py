"""Declares the native operators of a torchvision that was built for another torch.

PyPI's torchvision for Linux is a CUDA build. Beside a CPU build of torch its C++ extension does not
load, and its import raises: it describes operators that nobody has declared. Its Python part, all
that vLLM and the image processors of transformers use, works once they are declared.

torch calls ``install`` at the end of its own import (entry point ``torch.backends``): vLLM imports
torchvision before it asks for any plug-in, and so do programs without vLLM.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

# Those that torchvision describes without asking for its extension. They have no kernels: a call
# raises NotImplementedError.
OPERATORS = ("nms", "qnms")
SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class BeforeTorchvision(MetaPathFinder):
    """Finds no module; hears that torchvision is about to be imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == "torchvision":
            declare_missing()
        return None


def install() -> None:
    """Does nothing beside a torch with CUDA, and nothing until torchvision is imported."""
    import torch

    if torch.version.cuda is None and not any(
        isinstance(finder, BeforeTorchvision) for finder in sys.meta_path
    ):
        sys.meta_path.insert(0, BeforeTorchvision())


def declare_missing() -> None:
    """Declare the operators unless torchvision's own extension does."""
    import torch

    package = PathFinder.find_spec("torchvision")
    if package is None or has_extension(package):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in OPERATORS:
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}{SCHEMA}")
    _libraries.append(library)  # what it declares is gone when it is


def has_extension(package: ModuleSpec) -> bool:
    """Does torchvision's C++ extension load into this torch?"""
    import torch

    extension = PathFinder.find_spec("_C", package.submodule_search_locations)
    if extension is None or extension.origin is None:
        return False
    try:
        torch.ops.load_library(extension.origin)
    except OSError:
        return False
    return True


_libraries: list[object] = []

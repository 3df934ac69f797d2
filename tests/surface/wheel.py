"""vLLM's Python files, installed or inside a wheel of the package index, read one by one.

Nothing is imported or installed. Of a wheel (hundreds of MB) only the files asked for travel, by
HTTP range requests of pip's own client: index, proxy and certificates are the ones pip is set to.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusedstep"
PLATFORM = "manylinux_2_28_x86_64"  # what the CUDA wheels are built for
HEADER_BYTES = 1024  # room for a zip member's own header
NAMES = "names.txt"  # of all files in the wheel
DONE = "done"


class IndexUnreachable(Exception):
    """A wheel's files could be had neither from the cache nor from the package index."""


@dataclass(frozen=True)
class Sources:
    """``read`` gives the text of a file such as ``vllm/envs.py``, None where there is none."""

    version: str
    read: Callable[[str], str | None]


def installed() -> Sources:
    """The vLLM that is installed, found without importing it."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations, "vLLM is not installed"
    root = Path(spec.submodule_search_locations[0]).parent

    def read(path: str) -> str | None:
        file = root / path
        return file.read_text(encoding="utf-8") if file.is_file() else None

    (distribution,) = set(importlib.metadata.packages_distributions()["vllm"])
    return Sources(importlib.metadata.version(distribution), read)


@contextlib.contextmanager
def wheel(version: str) -> Iterator[Sources]:
    """The CUDA wheel ``vllm==version``. What was read once is read from the cache.

    Raises:
        IndexUnreachable: from ``read``.
    """
    folder = CACHE / f"vllm-{version}"
    with contextlib.ExitStack() as stack:
        child: subprocess.Popen[str] | None = None

        def cached(path: str) -> str:
            nonlocal child
            file = folder / path
            if not file.is_file():
                if child is None:  # a process of its own: pip changes the one it is imported in
                    command = [sys.executable, "-P", __file__, version, str(folder)]
                    child = stack.enter_context(
                        subprocess.Popen(
                            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                        )
                    )
                assert child.stdin is not None and child.stdout is not None
                print(path, file=child.stdin, flush=True)
                answer = child.stdout.readline().strip() or "the reader died"
                if answer != DONE:
                    raise IndexUnreachable(
                        f"cannot read {path} of vLLM {version}'s wheel from the package index, "
                        f"and it is not in {folder}: {answer}"
                    )
            return file.read_text(encoding="utf-8")

        names = None

        def read(path: str) -> str | None:
            nonlocal names
            names = names or frozenset(cached(NAMES).splitlines())
            return cached(path) if path in names else None

        yield Sources(version, read)


def serve(version: str, folder: Path) -> None:
    """The child: puts files that are asked for on stdin into ``folder``, answers in one line."""
    with contextlib.ExitStack() as stack:
        archive: zipfile.ZipFile | None = None
        for path in map(str.strip, sys.stdin):
            try:
                if archive is None:
                    archive = stack.enter_context(_remote_wheel(version))
                _put(folder / path, _text(archive, path))
                print(DONE, flush=True)
            except Exception as error:
                print(*f"{type(error).__name__}: {error}".split(), flush=True)


def _text(archive: zipfile.ZipFile, path: str) -> str:
    if path == NAMES:
        return "\n".join(archive.namelist())
    member = archive.getinfo(path)
    assert archive.fp is not None
    archive.fp.seek(member.header_offset)
    archive.fp.read(member.compress_size + HEADER_BYTES)  # one request, kept by pip
    return archive.read(path).decode()


def _put(file: Path, text: str) -> None:
    """Whole or not at all: another run may read it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


@contextlib.contextmanager
def _remote_wheel(version: str) -> Iterator[zipfile.ZipFile]:
    """pip finds the wheel and reads the parts of it that are asked for."""
    from pip._internal.cli.cmdoptions import make_target_python
    from pip._internal.commands import create_command
    from pip._internal.network.lazy_wheel import LazyZipOverHTTP
    from pip._vendor.packaging.specifiers import SpecifierSet

    command: Any = create_command("download")
    options, _ = command.parse_args(
        ["vllm", f"--platform={PLATFORM}", "--timeout=20", "--retries=1"]
    )
    with command._build_session(options) as session:
        finder = command._build_package_finder(
            options,
            session,
            target_python=make_target_python(options),
            ignore_requires_python=True,
        )
        best = finder.find_best_candidate("vllm", SpecifierSet(f"=={version}")).best_candidate
        if best is None or not best.link.is_wheel:
            raise LookupError(f"pip finds no wheel vllm=={version}, or no index to look in")
        with (
            LazyZipOverHTTP(best.link.url_without_fragment, session) as remote,
            zipfile.ZipFile(remote) as archive,
        ):
            yield archive


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))

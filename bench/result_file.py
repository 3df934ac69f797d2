"""Files of results: written whole or not at all, so that who is cut short keeps the last one."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path

from fusedstep.errors import ConfigError


def check(path: str, option: str = "--json") -> None:
    """Find out before the work, not after it, and leave no file behind.

    Raises:
        ConfigError: the file could not be written.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise _cannot_write(path, "it is a folder", option)
    if not target.parent.is_dir():
        raise _cannot_write(path, "its folder does not exist", option)
    try:
        if _is_plain(target):
            with tempfile.TemporaryFile(dir=target.parent):
                pass
    except OSError as error:
        raise _cannot_write(path, error.strerror, option) from None


def as_json(result: object) -> str:
    """A dataclass or plain data as JSON."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        result = dataclasses.asdict(result)
    return json.dumps(result, indent=2, ensure_ascii=False, default=str) + "\n"


def write(path: str, result: object, *, so_far: bool = False) -> None:
    """Write JSON as ``write_text``."""
    write_text(path, as_json(result), so_far=so_far)


def write_text(path: str, text: str, *, so_far: bool = False, option: str = "--json") -> None:
    """Replace the file. What is ``so_far`` only goes to plain files, not to a pipe or a device.

    Raises:
        ConfigError: the file cannot be written.
    """
    target = Path(os.path.realpath(path))
    try:
        if not _is_plain(target):
            if not so_far:
                target.write_text(text, encoding="utf-8")
            return
        new = target.with_name(f"{target.name}.{os.getpid()}.new")
        try:
            new.write_text(text, encoding="utf-8")
            new.replace(target)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(path, error.strerror, option) from None


def _is_plain(target: Path) -> bool:
    return target.is_file() or not target.exists()


def _cannot_write(path: str, reason: str | None, option: str) -> ConfigError:
    return ConfigError(f"cannot write {path} ({reason}): name another file after {option}")

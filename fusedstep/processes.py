"""However a command ends, what it has started ends, too.

A command (``fusedstep serve``, a measurement, a program with a ``fusedstep.LLM``) may be killed
before it can end its engines, and an engine that is stopped or computes hears of nothing. So:

* a command has a guardian (``guardian.py``), a process that sleeps until the command has ended,
  then kills all that belongs to it, and cleans up;
* both hold a FIFO, the lifeline, for writing; a process that belongs to the command holds it for
  reading (``belong``), by which the guardian knows it, and has asked the kernel for SIGKILL at the
  moment when the last writer has gone: should the guardian be killed, too, it ends all the same.

SIGKILL ends a stopped process, too. Nothing is polled. The environment of a process says to which
command it belongs (``VARIABLE``).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from multiprocessing import spawn
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from fusedstep import guardian
from fusedstep.errors import INTERRUPTED, FusedStepError
from fusedstep.guardian import LIFELINE, VARIABLE

START_SECONDS = 60.0
# From the signal that ends a command to its end, whatever it waits for.
GRACE_SECONDS = 5

_command: tuple[Path, int] | None = None  # this process's own: its folder, its lifeline
_held: tuple[Path, int] | None = None  # of the command that this process belongs to


def begin() -> Path:
    """Make this process a command; its folder, which goes when the command ends. Idempotent.

    It may belong to another command, which has started it.

    Raises:
        FusedStepError: its guardian does not start.
    """
    global _command
    if _command is None:
        belong()
        folder = Path(tempfile.mkdtemp(prefix="fusedstep-")).resolve()  # as the kernel names it
        os.mkfifo(folder / LIFELINE, 0o600)
        lifeline = os.open(folder / LIFELINE, os.O_RDWR)
        _start_guardian(folder)
        _command = folder, lifeline
    return _command[0]


def _start_guardian(folder: Path) -> None:
    """Away from the command's session, terminal and folder; it is on watch when this returns."""
    python = os.fsdecode(spawn.get_executable())
    try:
        subprocess.run(
            [python, "-P", guardian.__file__, str(folder), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if name != VARIABLE},
            cwd="/",
            start_new_session=True,
            check=True,
            timeout=START_SECONDS,
        )
    except (OSError, subprocess.SubprocessError) as error:
        words = getattr(error, "stderr", None) or str(error).encode()
        reason = words.decode(errors="replace").strip().splitlines()[-1]
        raise FusedStepError(f"cannot start the process that ends the others: {reason}") from None


def environment() -> dict[str, str]:
    """Variables that tell a process that it belongs to this command."""
    return {VARIABLE: str(begin())}


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Processes that this one starts meanwhile belong to its command.

    For a program that may start others, too, which are none of our business.
    """
    before = os.environ.get(VARIABLE)
    os.environ |= environment()
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def folder() -> Path | None:
    """The folder of the command that this process is, else of the one that it belongs to."""
    if _command is not None:
        return _command[0]
    name = os.environ.get(VARIABLE)
    return Path(name) if name else None


def belong() -> None:
    """From now on this process ends, by the kernel's hand, when its command ends. Idempotent."""
    global _held
    name = os.environ.get(VARIABLE)
    if not name or any(known and known[0] == Path(name) for known in (_command, _held)):
        return
    try:
        lifeline = os.open(Path(name, LIFELINE), os.O_RDONLY | os.O_NONBLOCK)
    except OSError:  # the command has ended, and its guardian has looked for us, or is elsewhere
        return
    _held = Path(name), lifeline
    with contextlib.suppress(AttributeError, OSError):  # Linux: else the guardian does it
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_NONBLOCK | os.O_ASYNC)
    with contextlib.suppress(BlockingIOError):  # which says that somebody holds the other end
        os.read(lifeline, 1)
        os._exit(INTERRUPTED)


def _after_fork() -> None:
    """In a forked process: the lifelines were its parent's."""
    global _command, _held
    for _, lifeline in filter(None, (_command, _held)):
        os.close(lifeline)
    _command = _held = None
    belong()


os.register_at_fork(after_in_child=_after_fork)


def remove_at_end(path: Path) -> None:
    """Have a file removed with the command, if there is one, should its owner be killed."""
    if (shared := folder()) is not None:
        with contextlib.suppress(OSError):
            (shared / path.name).symlink_to(path)


def started() -> set[psutil.Process]:
    """Processes that this one has started, and that those have."""
    return set(psutil.Process().children(recursive=True))


def end_started(spare: set[psutil.Process]) -> None:
    """Kill what this process has started, but for these."""
    guardian.kill_all(lambda: started() - spare)


def end_session(leader: int) -> None:
    """Kill a process that was started in a session of its own, and all that it has started."""
    guardian.kill_all(lambda: guardian.of_session(leader))


def interrupt_on_signals() -> None:
    """SIGTERM and SIGHUP end this command as SIGINT does: by KeyboardInterrupt, within 5 s."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup; a shell's background job
            signal.signal(number, _interrupt)


def _interrupt(*_: object) -> NoReturn:
    if not signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.signal(signal.SIGALRM, _end_now)
        signal.alarm(GRACE_SECONDS)
    raise KeyboardInterrupt


def _end_now(number: int, frame: FrameType | None) -> NoReturn:
    os._exit(INTERRUPTED)

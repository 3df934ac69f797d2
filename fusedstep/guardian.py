"""The guardian of a command: a small process that ends what the command leaves behind.

    python guardian.py FOLDER PID

``processes.py`` starts one per command and says what belongs to it. The guardian sleeps until the
command has ended, however that came about; then it kills what is left, stopped processes too, and
removes the command's files. It is run by its path and imports nothing of fusedstep.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import psutil

VARIABLE = "FUSEDSTEP_COMMAND"  # its value: the folder of the command
LIFELINE = "lifeline"  # a FIFO in it
LOOKS = 3  # that find nothing: a process may have been about to start another
LOOK_SECONDS = 0.1
GIVE_UP_SECONDS = 60.0  # a process that hangs in the kernel outlives SIGKILL
CLEANER_SECONDS = 3.0
CLEANER = "multiprocessing.resource_tracker"  # unlinks shared memory when its users have gone
GONE = (psutil.Error, OSError)

Find = Callable[[], set[psutil.Process]]


def of_command(folder: Path) -> set[psutil.Process]:
    """The processes that belong to a command, and what those have started.

    A process says so by its environment, or where that is hidden (a forked process shows its
    parent's, setproctitle overwrites it) by holding the lifeline.
    """
    found = {process for process in psutil.process_iter() if _belongs(process, folder)}
    for process in tuple(found):
        with contextlib.suppress(*GONE):
            found.update(process.children(recursive=True))
    return found


def of_session(leader: int) -> set[psutil.Process]:
    """The processes of a session."""
    return {process for process in psutil.process_iter() if _session(process.pid) == leader}


def kill_all(find: Find, looks: int = 1) -> None:
    """SIGKILL what ``find`` finds until so many looks in a row have found nothing alive.

    Python's cleaners of shared memory are spared. What vLLM's workers on a CPU share, which they
    alone clean up, is removed.
    """
    deadline = time.monotonic() + GIVE_UP_SECONDS
    shared: set[str] = set()
    nothing = 0
    while nothing < looks and time.monotonic() < deadline:
        found = _alive(find, cleaners=False)
        nothing = 0 if found else nothing + 1
        for process in found:
            shared.update(shared_memory(process.pid))
        for process in found:
            with contextlib.suppress(*GONE):
                process.kill()
        if nothing < looks:
            time.sleep(LOOK_SECONDS)
    for name in shared:
        Path(name).unlink(missing_ok=True)


def end_cleaners(find: Find) -> None:
    """Python's cleaners of shared memory end when its users have gone, if they are not stopped."""
    deadline = time.monotonic() + CLEANER_SECONDS
    while cleaners := _alive(find, cleaners=True):
        for process in cleaners:
            with contextlib.suppress(*GONE):
                process.resume() if time.monotonic() < deadline else process.kill()
        time.sleep(LOOK_SECONDS)


def _alive(find: Find, *, cleaners: bool) -> list[psutil.Process]:
    me = psutil.Process()
    return [p for p in find() if p != me and not _ended(p) and _cleans(p) is cleaners]


def _ended(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except GONE:
        return True


def _cleans(process: psutil.Process) -> bool:
    try:
        return any(CLEANER in part for part in process.cmdline())
    except GONE:
        return False


def shared_memory(pid: int) -> list[str]:
    """Names of memory that vLLM's workers on a CPU share."""
    with contextlib.suppress(OSError):
        return re.findall(r"/dev/shm/vllm_dist_\S+", Path(f"/proc/{pid}/maps").read_text())
    return []


def _session(pid: int) -> int | None:
    with contextlib.suppress(OSError):
        return os.getsid(pid)
    return None


def _belongs(process: psutil.Process, folder: Path) -> bool:
    with contextlib.suppress(*GONE):
        if process.environ().get(VARIABLE) == str(folder):
            return True
    return str(folder / LIFELINE) in _open_files(process.pid)


def _open_files(pid: int) -> Iterator[str]:
    """Names of open files, on Linux."""
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                yield os.readlink(entry.path)


def remove(folder: Path) -> None:
    """The command's folder, and the files elsewhere that links in it name."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_symlink():
            with contextlib.suppress(OSError):
                entry.readlink().unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _end_of(pid: int) -> Callable[[], object]:
    """Returns when the process has ended that has this number now."""
    try:
        end = select.poll()
        end.register(os.pidfd_open(pid), select.POLLIN)
        return end.poll
    except (AttributeError, OSError):  # macOS, an old kernel, or it has ended
        return partial(psutil.wait_procs, [psutil.Process(pid)] if psutil.pid_exists(pid) else [])


def main(folder: Path, pid: int) -> None:
    """Return once a guardian, which is no child of the command, is on watch.

    It holds the lifeline while it works: children are found by their parents, which must not be
    killed first.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.open(folder / LIFELINE, os.O_RDWR)
    wait_for_end = _end_of(pid)
    if os.fork():  # a program that waits for all its children must not wait for this one
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the command reads ours until it is closed
    wait_for_end()
    find = partial(of_command, folder)
    kill_all(find, LOOKS)
    end_cleaners(find)
    remove(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

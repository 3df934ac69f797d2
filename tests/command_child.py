"""A command with every kind of process that a command may have; says READY when they are there.

    python command_child.py on|off|theirs|swallows|return|raise|_exit

off: without what ends them; theirs: it starts one more, which does not belong to it; swallows: it
goes on after a KeyboardInterrupt; return, raise, _exit: this is how it ends by itself.
"""

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import time
from multiprocessing import shared_memory
from pathlib import Path

import psutil

from fusedstep import processes

START = "import os, signal, subprocess, sys, time; from fusedstep import processes; "
BELONG = START + "processes.belong(); "
READY = "open(sys.argv[1], 'w').close(); "
SLEEP = READY + "time.sleep(300)"
TITLE = "import setproctitle; setproctitle.setproctitle('VLLM::EngineCore'); "
KINDS = {
    "does not belong yet": START + SLEEP,
    "belongs": BELONG + SLEEP,
    "stopped": BELONG + READY + "os.kill(os.getpid(), signal.SIGSTOP)",
    "deaf, in a session of its own": BELONG
    + "[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]; os.setsid(); "
    + SLEEP,
    "its environment cannot be seen": BELONG + TITLE + SLEEP,
    "its child has no environment": BELONG
    + "subprocess.Popen(['/bin/sleep', '301'], env={}); "
    + SLEEP,
    "its parent has ended": BELONG + "os.fork() and os._exit(0); " + TITLE + SLEEP,
    "a command, too": BELONG
    + "os.environ |= processes.environment(); "
    + "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(302)']); "
    + SLEEP,
}


def main(how: str) -> None:
    if how == "off":
        processes.begin = lambda: Path(os.environ["TMPDIR"])  # type: ignore[assignment]
    folder = processes.begin()
    assert not psutil.Process().children(), "a program may wait for all its children"
    marks = Path(os.environ["TMPDIR"], "marks")
    marks.mkdir()
    with processes.starting():
        for kind, code in KINDS.items():
            subprocess.Popen([sys.executable, "-c", code, str(marks / kind)])
        if os.fork() == 0:
            Path(marks / "forked").touch()
            signal.pause()
        memory = shared_memory.SharedMemory(create=True, size=64)
    named = Path(f"/dev/shm/fusedstep-test-{os.getpid()}")
    named.write_bytes(b"x")
    with named.open() as file:
        mapped = mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ)
    processes.remove_at_end(named)
    Path(folder, "temporary").mkdir()
    if how == "theirs":
        subprocess.Popen(["/bin/sleep", "303"])
    while len(list(marks.iterdir())) < len(KINDS) + 1:
        time.sleep(0.02)
    print("READY", memory.name, len(mapped), flush=True)
    if how in ("return", "raise", "_exit"):
        time.sleep(1)  # to be seen
        if how == "raise":
            raise MemoryError
        if how == "_exit":
            os._exit(3)
        return
    while how == "swallows":
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(300)
    try:
        time.sleep(300)
    finally:
        print("finally", flush=True)


if __name__ == "__main__":
    processes.interrupt_on_signals()
    try:
        main(sys.argv[1])
    except KeyboardInterrupt:
        sys.exit(130)

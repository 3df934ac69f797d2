"""Two hosts on this machine: each has a network, a ``/dev/shm`` and a name of its own.

    unshare --user --map-root-user --net --mount --pid --fork --kill-child --mount-proc \\
        python two_hosts.py JSON JSON

Runs a command (a list of words) on each. ``JOIN`` makes the namespaces; a cable of two virtual
network devices is all that the hosts share beside the disk. Ends when both commands have, with
the first exit code that is not 0; processes that they leave behind are a failure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
DEVICE = "cable"
JOIN = (
    *("unshare", "--user", "--map-root-user", "--net", "--mount", "--pid"),
    *("--fork", "--kill-child", "--mount-proc"),
)
HOST = ("unshare", "--net", "--mount", "--uts", "--ipc")
# What a host does when its end of the cable is there: a line on stdin says so.
SET_UP = f"""set -e
mount -t tmpfs -o size=4g tmpfs /dev/shm
hostname "$1"
echo up
read -r _
ip link set lo up
ip address add "$2/24" dev {DEVICE}
ip link set {DEVICE} up
shift 2
exec "$@" < /dev/null >&2
"""
PROBE = """set -e
mount -t tmpfs tmpfs /dev/shm
hostname probe
ip link add one type veth peer name two
"""
SECONDS = 20.0  # for the last processes to end


def missing() -> str | None:
    """Why this machine cannot have two hosts, in its own words."""
    try:
        done = subprocess.run(
            [*JOIN, *HOST, "sh", "-c", PROBE], capture_output=True, text=True, timeout=60
        )
    except FileNotFoundError as error:
        return str(error)
    return None if done.returncode == 0 else done.stderr.strip() or "unshare failed"


def main(commands: list[list[str]]) -> int:
    hosts = [
        subprocess.Popen(
            [*HOST, "sh", "-c", SET_UP, "sh", f"host{n}", ADDRESSES[n], *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for n, command in enumerate(commands)
    ]
    for host in hosts:
        assert host.stdout is not None and host.stdout.readline() == b"up\n"
    ends = [f"end{n}" for n in range(2)]
    ip(["link", "add", ends[0], "type", "veth", "peer", "name", ends[1]])
    for end, host in zip(ends, hosts, strict=True):
        ip(["link", "set", end, "netns", str(host.pid), "name", DEVICE])
        assert host.stdin is not None
        host.stdin.write(b"go\n")
        host.stdin.close()
    code = next(filter(None, [host.wait() for host in hosts]), 0)
    deadline = time.monotonic() + SECONDS
    while (left := running()) and time.monotonic() < deadline:
        time.sleep(0.2)
    print("\n".join(f"left: {words}" for words in left), file=sys.stderr)
    return code or bool(left)


def running() -> list[str]:
    """Commands of all processes of both hosts that have not ended; this one is none of them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            words = (folder / "cmdline").read_text().replace("\0", " ").strip()
        except OSError:  # ended meanwhile
            continue
        if int(folder.name) != os.getpid() and state not in "ZX":
            found.append(f"{folder.name} {words}")
    return found


def ip(words: list[str]) -> None:
    subprocess.run(["ip", *words], check=True)


if __name__ == "__main__":
    sys.exit(main([json.loads(word) for word in sys.argv[1:]]))

"""The table of what each shipped kernel costs on each GPU, compiled without one.

    cd tests && python -m ops.kernel_table

compiles all of it and writes the table of this process's Triton version, ``kernel_tables/``. For
another version of Triton than the environment's, put it in a folder of its own before:

    pip install --target DIR --no-deps triton==3.6.0
    cd tests && PYTHONPATH=DIR python -m ops.kernel_table

``test_compile.py`` compiles some of it (``of_ci``) and holds it against the table of its version.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from triton import __version__ as triton_version

TABLES = Path(__file__).with_name("kernel_tables")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
RENEW = "cd tests && python -m ops.kernel_table"
# A row's name, then its numbers; ``machine_code.py`` says what each counts.
NAME = ("kernel", "target", "for")
NUMBERS = (
    "registers",
    "local",  # bytes of a thread in memory
    "spills",
    "scalar spills",
    "shared",
    "programs per SM",
    "load bytes",
    "loads before",
    "barriers before",
    "releases",
    "before arrival",
    "noise path",
    "main loop",
    "other loops",
    "size",
)
MORE_IS_BETTER = ("programs per SM", "load bytes")
COLUMNS = (*NAME, *NUMBERS)

Name = tuple[str, ...]
Table = dict[Name, dict[str, int]]


def path() -> Path:
    """Of the table for this Triton version; a patch release has no table of its own."""
    return TABLES / f"triton-{'.'.join(triton_version.split('.')[:2])}.tsv"


def parse(lines: Iterable[str]) -> Table:
    """By kernel, target and what it is for."""
    header, *rows = [line.rstrip("\n").split("\t") for line in lines]
    if tuple(header) != COLUMNS:
        raise ValueError(f"a table of other columns: renew it with `{RENEW}`")
    table = {
        tuple(row[: len(NAME)]): dict(zip(NUMBERS, map(int, row[len(NAME) :]), strict=True))
        for row in rows
    }
    if len(table) < len(rows):
        raise ValueError("two kernels of one name")
    return table


def written(table: Table) -> str:
    """As ``parse`` reads it, sorted."""
    rows = sorted((*name, *map(str, numbers.values())) for name, numbers in table.items())
    return "".join("\t".join(row) + "\n" for row in (COLUMNS, *rows))


def differences(before: Table, now: Table) -> list[str]:
    """One line for each number that has changed, those that got worse first."""
    worse, better = [], []
    for name in sorted(before.keys() | now.keys()):
        where = f"{name[0]} on {name[1]} ({name[2]})"
        if name not in now or name not in before:
            worse.append(f"{where}: {'gone' if name in before else 'new'}")
            continue
        for column, number in now[name].items():
            old = before[name][column]
            if number != old:
                gain = (number > old) == (column in MORE_IS_BETTER)
                line = f"{where}: {column} {old} -> {number}"
                (better if gain else worse).append(f"{'better' if gain else 'WORSE'}: {line}")
    return [f"{line}; if it is meant: {RENEW}" for line in worse + better]


def of_ci(table: Table) -> set[Name]:
    """The rows that CI compiles: all of sm_90, and a third of each other target's.

    A change of a kernel changes it for sm_90, too: the whole table has to be renewed.
    """
    rows = sorted(table, key=lambda name: (name[2], name[0], name[1]))
    return {name for i, name in enumerate(rows) if name[1] == "sm_90" or i % 3 == 0}


def compiled(only: Iterable[Name] | None = None) -> Table:
    """What the kernels cost as they are now, by two processes; of sm_90 also those not asked for.

    Raises:
        RuntimeError: one does not compile, or its accesses are not in order.
    """
    names = "".join("\t".join(name) + "\n" for name in only or ())

    shares: list[tuple[str, ...]] = [("sm_90", "gfx942"), ("sm_80", "sm_100")]
    if only is not None:
        shares = [("sm_90",), ("sm_80", "sm_100", "gfx942")]

    def run(targets: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        options = [] if only is None else ["--only"]
        return subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "ops.compile_kernels", *options, *targets],
            cwd=Path(__file__).parent.parent,
            env=os.environ | {"TRITON_INTERPRET": "0"},
            text=True,
            input=names,
            capture_output=True,
            timeout=3000,
        )

    table: Table = {}
    with ThreadPoolExecutor() as threads:
        for process in threads.map(run, shares):
            if process.returncode != 0:
                raise RuntimeError(process.stderr)
            table |= parse(process.stdout.splitlines())
    return table


def main() -> None:
    """Write the table, say what has changed."""
    table, file = compiled(), path()
    kept = file.read_text().splitlines() if file.exists() else [""]
    if kept[0].split("\t") == list(COLUMNS):
        print(*differences(parse(kept), table), sep="\n")
    TABLES.mkdir(exist_ok=True)
    file.write_text(written(table))
    print(f"{len(table)} kernels: {file.relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()

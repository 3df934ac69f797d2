"""Records a command as an SVG picture of the terminal: what README shows is what was printed.

    python docs/images/record.py verify.svg fusedstep verify --limit 8 > /dev/null

The command runs in a pseudo-terminal; what it leaves on the screen is kept, not what it overwrote.
"""

from __future__ import annotations

import os
import pty
import re
import shlex
import sys
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

COLUMNS = 110
FOLDER = Path(__file__).parent
# A status line that rich draws and takes away again: carriage return, erase, perhaps one line up.
OVERWRITTEN = re.compile(r"[^\n]*(?:\r\x1b\[2K|\n(?:\x1b\[\?25h)?\r?\x1b\[1A\x1b\[2K)")
CURSOR = re.compile(r"\x1b\[\?25[lh]|\x1b\[[0-9]*[A-LSTf]|\x1b\[2?K|\r")


def record(command: list[str]) -> str:
    """What ``command`` leaves on a terminal, with its colours. Raises SystemExit if it fails."""
    os.environ.update(COLUMNS=str(COLUMNS), TERM="xterm-256color", FORCE_COLOR="1")
    printed = bytearray()

    def read(descriptor: int) -> bytes:
        data = os.read(descriptor, 1 << 16)
        printed.extend(data)
        return data

    if pty.spawn(command, read) != 0:
        raise SystemExit(f"{shlex.join(command)} failed")
    text = printed.decode().replace("\r\n", "\n")
    return CURSOR.sub("", OVERWRITTEN.sub("", text)).strip("\n")


def main() -> None:
    name, *command = sys.argv[1:]
    screen = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"))  # noqa: SIM115
    screen.print(Text.assemble(("$ ", "bold green"), shlex.join(command)))
    screen.print(Text.from_ansi(record(command)))
    without_web_fonts = re.sub(r"@font-face \{\{.*?\}\}\s*", "", CONSOLE_SVG_FORMAT, flags=re.S)
    screen.save_svg(str(FOLDER / name), title="fusedstep", code_format=without_web_fonts)


if __name__ == "__main__":
    main()

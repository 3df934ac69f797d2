"""The command line: parse, call one library function, print."""

from fusedstep.cli.main import main

__all__ = ["main"]

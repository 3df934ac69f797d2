"""``python -m fusedstep``: the command line, for where the script is not on the PATH."""

from fusedstep.cli import main

if __name__ == "__main__":
    main()

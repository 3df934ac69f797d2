"""Grammars as tables: xgrammar's compiled grammars, made ready for a device that samples alone.

A grammar becomes an automaton over bytes. In each state a mask says which tokens may come; the
bytes of the token that was sampled lead to the next state. ``build`` makes the tables and proves
them: every state's mask is xgrammar's own, and equals what the tables themselves let through.
"""

from fusedstep.grammar.automaton import Automaton, Limits, build, warm
from fusedstep.grammar.entries import NOWHERE, OUTSIDE
from fusedstep.grammar.rules import NoAutomaton
from fusedstep.grammar.vocabulary import Vocabulary

ENDED = NOWHERE
"""What ``Automaton.after`` gives once a stop token has come: any token may follow."""

__all__ = [
    "ENDED",
    "NOWHERE",
    "OUTSIDE",
    "Automaton",
    "Limits",
    "NoAutomaton",
    "Vocabulary",
    "build",
    "warm",
]

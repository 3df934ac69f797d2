"""Entries of a table of next states that are no numbers of states."""

NOWHERE = -1  # no state: the grammar does not go on like this
OUTSIDE = -2  # a state that the tables do not hold

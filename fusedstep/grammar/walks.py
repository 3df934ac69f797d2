"""Kernels (numba): walks of a whole vocabulary's tokens through a table of next states.

They release the GIL. They stand in one file because numba's on-disk cache sees changes of a
kernel's own file only.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, assignment"

from __future__ import annotations

import numpy as np
from numba import njit

from fusedstep.grammar.entries import NOWHERE

_ROOT_NODE, _FIRST_NODE = 1, 2  # of a tree in levels; node 0 is that of tokens without bytes
_OUTSIDE_ROW, _NOWHERE_ROW, _STATE_ROW = np.uint32(0), np.uint32(256), np.uint32(512)
SAME, MORE, LESS, STOP, AMBIGUOUS = 0, 1, 2, 3, 4  # what compare finds
_FEW = 4096  # nodes of a tree, beyond which a walk over all of them is faster


@njit(cache=True, nogil=True)
def plant(offsets, data, order):
    """The arrays of vocabulary.Tree, for the tokens ``order`` sorted by their bytes."""
    num_tokens = len(offsets) - 1
    num_nodes = 0
    longest = 0
    previous_first, previous_length = 0, 0
    shared = np.empty(len(order), np.int32)
    for i in range(len(order)):
        first, length = offsets[order[i]], offsets[order[i] + 1] - offsets[order[i]]
        common = 0
        while (
            common < min(length, previous_length)
            and data[first + common] == data[previous_first + common]
        ):
            common += 1
        shared[i] = common
        num_nodes += length - common
        longest = max(longest, length)
        previous_first, previous_length = first, length
    depth = np.empty(num_nodes, np.int32)
    byte = np.empty(num_nodes, np.uint8)
    after = np.full(num_nodes, num_nodes, np.int32)
    tokens = np.empty(num_nodes + 1, np.int32)
    ends = np.zeros(num_nodes, np.int32)
    tokens[num_nodes] = len(order)
    path = np.empty(1 + longest, np.int32)
    height = 0
    node = 0
    for i in range(len(order)):
        first, length = offsets[order[i]], offsets[order[i] + 1] - offsets[order[i]]
        while height > shared[i]:
            height -= 1
            after[path[height]] = node
        while height < length:
            path[height] = node
            byte[node] = data[first + height]
            height += 1
            depth[node] = height
            tokens[node] = i
            ends[node] = i
            node += 1
        ends[path[height - 1]] = i + 1

    levels = np.zeros(longest + 2, np.int32)  # the number of each level's next node
    for node in range(num_nodes):
        levels[depth[node] + 1] += 1
    levels[1] = _FIRST_NODE
    for level in range(1, longest + 1):
        levels[level + 1] += levels[level]
    level_parent = np.zeros(_FIRST_NODE + num_nodes, np.uint32)
    level_byte = np.zeros(_FIRST_NODE + num_nodes, np.uint8)
    level_node = np.zeros((num_tokens + 31) // 32 * 32, np.uint32)
    path[0] = _ROOT_NODE
    for node in range(num_nodes):
        numbered = levels[depth[node]]
        levels[depth[node]] += 1
        level_parent[numbered] = path[depth[node] - 1]
        level_byte[numbered] = byte[node]
        path[depth[node]] = numbered
        for i in range(tokens[node], ends[node]):
            level_node[order[i]] = numbered
    return depth, byte, after, tokens, ends, level_parent, level_byte, level_node


@njit(cache=True, nogil=True)
def walk(table, state, offsets, data, token_ids):
    """The state after these tokens, NOWHERE or OUTSIDE; NOWHERE after one without bytes."""
    for token in token_ids:
        if state < 0:
            break
        first, end = offsets[token], offsets[token + 1]
        if first == end:
            return NOWHERE
        for i in range(first, end):
            state = table[state, data[i]]
            if state < 0:
                break
    return state


@njit(cache=True, nogil=True)
def row_starts(table):
    """The table for walks of many tokens: each entry is the index where the next state's row is.

    There are two rows before those of the states: OUTSIDE leads OUTSIDE, NOWHERE leads NOWHERE.
    Unsigned, so that no index is looked at for being negative.
    """
    result = np.empty((len(table) + 2) * 256, np.uint32)
    result[:256] = _OUTSIDE_ROW
    result[256:512] = _NOWHERE_ROW
    for state in range(len(table)):
        for byte in range(256):
            result[(state + 2) * 256 + byte] = np.uint32((table[state, byte] + 2) * 256)
    return result


@njit(cache=True, nogil=True)
def _walk_few(rows, state, tree, path, ours, outside):
    """The tokens that ``state`` lets through, by descent into the tree; False if there are many."""
    depth, byte, after, tokens, ends, order = tree
    ours[:] = 0
    outside[:] = 0
    path[0] = (state + 2) * 256
    node = np.uint32(0)
    visited = 0
    while node < np.uint32(len(depth)):
        visited += 1
        if visited > _FEW:
            return False
        below = depth[node]
        row = rows[path[below - 1] + np.uint32(byte[node])]
        if row >= _STATE_ROW:
            path[below] = row
            for i in range(tokens[node], ends[node]):
                ours[order[i] >> 5] |= np.uint32(1) << np.uint32(order[i] & 31)
            node += np.uint32(1)
        else:
            if row == _OUTSIDE_ROW:
                for i in range(tokens[node], tokens[after[node]]):
                    outside[order[i] >> 5] |= np.uint32(1) << np.uint32(order[i] & 31)
            node = np.uint32(after[node])
    return True


@njit(cache=True, nogil=True)
def _walk_all(rows, state, levels, reached, ours, outside):
    """The same level by level, without a branch: faster where much is let through."""
    level_parent, level_byte, level_node = levels
    reached[0] = _NOWHERE_ROW
    reached[_ROOT_NODE] = (state + 2) * 256
    for node in range(np.uint64(_FIRST_NODE), np.uint64(len(level_parent))):
        reached[node] = rows[reached[level_parent[node]] + np.uint32(level_byte[node])]
    for word in range(np.uint64(len(ours))):
        through, beyond = np.uint32(0), np.uint32(0)
        for bit in range(np.uint64(32)):
            row = reached[level_node[word * np.uint64(32) + bit]]
            through |= np.uint32(row >= _STATE_ROW) << np.uint32(bit)
            beyond |= np.uint32(row == _OUTSIDE_ROW) << np.uint32(bit)
        ours[word] = through
        outside[word] = beyond


@njit(cache=True, nogil=True)
def compare(table, rows, state, accept, tree, levels, offsets, data, stops, theirs, space):
    """Compares a mask of xgrammar's with what the table lets through in ``state``.

    Gives (SAME, _) or what is wrong and the first token with it. LESS: xgrammar lets less tokens
    through; ``space`` holds them. Tokens that lead OUTSIDE are not compared.
    ``rows``: see row_starts. ``space`` is for the walks: (rows on the path, rows that the nodes
    reach, two masks).
    """
    path, reached, ours, outside = space
    if not _walk_few(rows, state, tree, path, ours, outside):
        _walk_all(rows, state, levels, reached, ours, outside)
    for i in range(len(stops)):
        token = stops[i]
        word, bit = token >> 5, np.uint32(1) << np.uint32(token & 31)
        allowed = (np.uint32(theirs[word]) & bit) != 0
        if allowed != accept:
            return STOP, token
        if accept and walk(table, state, offsets, data, stops[i : i + 1]) != NOWHERE:
            return AMBIGUOUS, token
        outside[word] |= bit
    num_tokens = len(offsets) - 1
    outside[-1] |= ~(np.uint32(0xFFFFFFFF) >> np.uint32(-num_tokens % 32))  # these are no tokens
    found, first = SAME, -1
    for word in range(len(ours)):
        mask = np.uint32(theirs[word])
        more = mask & ~(ours[word] | outside[word])
        ours[word] &= ~(mask | outside[word])
        if more == 0 and ours[word] == 0:
            continue
        differ = more if more != 0 else ours[word]
        bit = 0
        while (differ >> np.uint32(bit)) & np.uint32(1) == 0:
            bit += 1
        if more != 0:
            return MORE, word * 32 + bit
        if found == SAME:
            found, first = LESS, word * 32 + bit
    return found, first

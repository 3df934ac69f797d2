"""Decode attention over a paged KV cache, which it also writes; splits are merged in the launch.

The tiles of all rows and heads stand in one line. Each program takes an equal share of it, so the
grid depends on no length: the programs read ``seq_lens`` on the device. An *item* is one row, KV
head and block of queries; a *piece* is the part of an item in one program's share. An item of one
piece is written at once; otherwise the last of its programs to arrive merges the pieces in order.

The step's new tokens are never read from the cache: the piece with the item's last tile takes them
from ``key`` and ``value`` and writes them to their slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedstep.kernels.attention_tile import (
    LOWEST,
    add_tile,
    finish,
    quantised,
    scores,
)
from fusedstep.kernels.winner import arrive

NEW = tl.constexpr(16)  # new tokens of a row, padded for tl.dot


@triton.jit
def _span(seq_len, query_len, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """Tokens before the new ones, the first of them that a query sees, its tile, and the tiles.

    There is one tile at least: a row's new tokens need a piece to be in.
    """
    context = tl.maximum(seq_len - query_len, 0)
    first_seen = context * 0
    if WINDOW > 0:
        first_seen = tl.maximum(context - WINDOW + 1, 0)
    first_tile = first_seen // TILE
    num_tiles = tl.maximum((context + TILE - 1) // TILE - first_tile, 1)
    return context, first_seen, first_tile, num_tiles


@triton.jit(do_not_specialize=["num_rows"])
def attend_kernel(
    tokens,  # query, key, value, output: [num_tokens, heads, HEAD_SIZE]
    cache_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE], any strides but the last
    rows,  # block_table [num_rows, n], seq_lens [num_rows], slots [num_tokens], starts
    layer,  # alibi_slopes, sinks: [heads]; k_scale, v_scale: [1] float32; each may be unused
    scratch,  # arrivals, zero between launches; tops, weights, sums of up to two pieces a program
    strides,
    num_rows,
    scale,  # of the scores
    soft_cap,  # unused unless SOFT_CAP
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,  # HEAD_SIZE up to a power of two
    GROUP: tl.constexpr,  # query heads per KV head
    NUM_KV_HEADS: tl.constexpr,
    QUERY_LEN: tl.constexpr,  # of any row, at most; of 1, row i has token i
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,  # tokens that a query sees, itself included; 0: all
    SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    SINKS: tl.constexpr,
    FP8_MAX: tl.constexpr,  # largest number of the cache's dtype; 0: not quantised
    PRECISION: tl.constexpr,  # of tl.dot on float32
    ROWS: tl.constexpr,  # a power of two, at least num_rows
    BLOCK_M: tl.constexpr,  # queries (token, head) per item
    M_BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    MIN_TILES: tl.constexpr,  # of a share
    CHUNK: tl.constexpr,  # pieces and queries that a merge takes at a time
    CHUNK_M: tl.constexpr,
):
    """Grid (any number of programs): attention of the rows' new tokens, starts[i] on in row i."""
    ITEMS: tl.constexpr = NUM_KV_HEADS * M_BLOCKS  # of a row
    program = tl.program_id(0)
    row_ids = tl.arange(0, ROWS)
    in_batch = row_ids < num_rows
    seq_lens = tl.load(rows.seq_lens + row_ids, mask=in_batch, other=0)
    query_lens = 1
    if QUERY_LEN > 1:
        starts = tl.load(rows.starts + row_ids, mask=in_batch, other=0)
        query_lens = tl.load(rows.starts + row_ids + 1, mask=in_batch, other=0) - starts
    _, _, _, row_tiles = _span(seq_lens, query_lens, TILE, WINDOW)
    ends = tl.cumsum(tl.where(in_batch, row_tiles * ITEMS, 0), axis=0)
    total = tl.max(ends, axis=0)
    num_programs = tl.num_programs(0)
    share = tl.maximum((total + num_programs - 1) // num_programs, MIN_TILES)
    place = program * share
    stop = tl.minimum(place + share, total)
    row = tl.sum((ends <= place).to(tl.int32), axis=0)
    row_place = tl.max(tl.where(ends <= place, ends, 0), axis=0)
    while place < stop:
        seq_len = tl.load(rows.seq_lens + row)
        first_token = row
        query_len = 1
        if QUERY_LEN > 1:
            first_token = tl.load(rows.starts + row)
            query_len = tl.load(rows.starts + row + 1) - first_token
        span = _span(seq_len, query_len, TILE, WINDOW)
        num_tiles = span[3]
        item = (place - row_place) // num_tiles
        item_place = row_place + item * num_tiles
        item_stop = item_place + num_tiles
        piece_stop = tl.minimum(stop, item_stop)
        _attend_piece(
            row,
            item,
            (first_token, query_len, tl.minimum(seq_len, query_len)),
            span,
            (program, share, place, piece_stop, item_place, item_stop),
            tokens,
            cache_ptr,
            rows,
            layer,
            scratch,
            strides,
            scale,
            soft_cap,
            HEAD_SIZE,
            DIMS,
            GROUP,
            QUERY_LEN,
            BLOCK_SIZE,
            WINDOW,
            SOFT_CAP,
            ALIBI,
            SINKS,
            FP8_MAX,
            PRECISION,
            BLOCK_M,
            M_BLOCKS,
            ITEMS,
            TILE,
            CHUNK,
            CHUNK_M,
        )
        place = piece_stop
        if place == row_place + num_tiles * ITEMS:
            row_place = place
            row += 1


@triton.jit
def _attend_piece(
    row,
    item,
    new_tokens,  # the first, how many, and how many of them are in the row
    span,
    bounds,  # program, share, first tile and end of the piece, of the item
    tokens,
    cache_ptr,
    rows,
    layer,
    scratch,
    strides,
    scale,
    soft_cap,
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERY_LEN: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    SINKS: tl.constexpr,
    FP8_MAX: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    M_BLOCKS: tl.constexpr,
    ITEMS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_M: tl.constexpr,
):
    first_token, query_len, num_new = new_tokens
    context, first_seen, first_tile, num_tiles = span
    program, share, place, piece_stop, item_place, item_stop = bounds
    kv_head = item // M_BLOCKS
    m_block = item % M_BLOCKS
    dims = tl.arange(0, DIMS)
    in_head = dims < HEAD_SIZE
    queries = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    is_query = queries < query_len * GROUP
    query_tokens = queries // GROUP
    query = tl.load(
        tokens.query + _place_of(queries, first_token, kv_head, strides.query, GROUP) + dims,
        mask=is_query[:, None] & in_head,
        other=0.0,
    )
    slopes = tl.zeros([BLOCK_M], tl.float32)
    if ALIBI:
        heads = kv_head * GROUP + queries % GROUP
        slopes = tl.load(layer.alibi_slopes + heads, mask=is_query, other=0.0).to(tl.float32)
    v_scale = 1.0
    if FP8_MAX > 0:
        scale = scale * tl.load(layer.k_scale)
        v_scale = tl.load(layer.v_scale)

    # The new tokens, in the item's last piece.
    new = tl.arange(0, NEW)
    num_new = tl.where(piece_stop == item_stop, num_new, 0)
    is_new = new < num_new
    token = first_token.to(tl.int64) + new
    keys_at = token * strides.key[0] + kv_head * strides.key[1]
    values_at = token * strides.value[0] + kv_head * strides.value[1]
    new_mask = is_new[:, None] & in_head
    cache_dtype: tl.constexpr = cache_ptr.dtype.element_ty
    new_keys = tl.load(tokens.key + keys_at[:, None] + dims, mask=new_mask, other=0.0)
    new_values = tl.load(tokens.value + values_at[:, None] + dims, mask=new_mask, other=0.0)
    new_keys = quantised(new_keys, layer.k_scale, cache_dtype, FP8_MAX)
    new_values = quantised(new_values, layer.v_scale, cache_dtype, FP8_MAX)
    num_written = tl.where(m_block == 0, num_new, 0)
    slots = tl.load(rows.slots + token, mask=new < num_written, other=-1).to(tl.int64)
    writes = (slots >= 0)[:, None] & in_head
    cached_at = (slots // BLOCK_SIZE) * strides.cache[0] + kv_head * strides.cache[1]
    cached_at += (slots % BLOCK_SIZE) * strides.cache[2]
    tl.store(cache_ptr + cached_at[:, None] + dims, new_keys, mask=writes)
    tl.store(cache_ptr + HEAD_SIZE + cached_at[:, None] + dims, new_values, mask=writes)
    distances = query_tokens[:, None] - new
    new_seen = is_new & (distances >= 0)
    if WINDOW > 0:
        new_seen = new_seen & (distances < WINDOW)
    new_scores = scores(
        query, tl.trans(new_keys), new, slopes, scale, soft_cap, SOFT_CAP, ALIBI, PRECISION
    )
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, DIMS], tl.float32)
    top, weight, sums = add_tile(
        top, weight, sums, new_scores, new_seen, new_values, query, PRECISION
    )

    # Those before them, from the cache.
    table = rows.block_table + row.to(tl.int64) * strides.block_table
    tile_end = tl.minimum(first_tile + piece_stop - item_place, (context + TILE - 1) // TILE)
    first_place = (first_tile + place - item_place) * TILE
    blocks = _blocks_of(first_place, table, first_seen, context, BLOCK_SIZE, TILE)
    for tile_place in range(first_place, tile_end * TILE, TILE):
        positions = tile_place + tl.arange(0, TILE)
        cached = (positions >= first_seen) & (positions < context)
        next_blocks = _blocks_of(tile_place + TILE, table, first_seen, context, BLOCK_SIZE, TILE)
        at = blocks.to(tl.int64) * strides.cache[0] + kv_head * strides.cache[1]
        at += (positions % BLOCK_SIZE) * strides.cache[2]
        keys = tl.load(
            cache_ptr + at[None, :] + dims[:, None],
            mask=cached[None, :] & in_head[:, None],
            other=0.0,
        )
        values = tl.load(
            cache_ptr + HEAD_SIZE + at[:, None] + dims, mask=cached[:, None] & in_head, other=0.0
        )
        seen = cached[None, :]
        if WINDOW > 0 and QUERY_LEN > 1:
            seen = seen & (context + query_tokens[:, None] - positions < WINDOW)
        tile_scores = scores(
            query,
            keys,
            positions - context,
            slopes,
            scale,
            soft_cap,
            SOFT_CAP,
            ALIBI,
            PRECISION,
        )
        top, weight, sums = add_tile(top, weight, sums, tile_scores, seen, values, query, PRECISION)
        blocks = next_blocks

    whole = num_tiles == piece_stop - place
    if whole:
        _put(
            queries,
            top,
            weight,
            sums,
            v_scale,
            first_token,
            query_len,
            kv_head,
            tokens,
            layer,
            strides,
            HEAD_SIZE,
            DIMS,
            GROUP,
            SINKS,
        )
    else:
        # A program has a piece at the start of its share, and one more that is not whole.
        left_at = (2 * program + (place != program * share).to(tl.int32)) * BLOCK_M
        left_at += tl.arange(0, BLOCK_M)
        tl.store(scratch.tops + left_at, top)
        tl.store(scratch.weights + left_at, weight)
        tl.store(scratch.sums + left_at[:, None] * DIMS + dims, sums)
        first = item_place // share
        last = (item_stop - 1) // share
        if arrive(row * ITEMS + item, last - first + 1, scratch):
            for start in range(0, BLOCK_M, CHUNK_M):
                merged = _merge(
                    start, first, last, share, item_place, scratch, DIMS, BLOCK_M, CHUNK, CHUNK_M
                )
                _put(
                    m_block * BLOCK_M + start + tl.arange(0, CHUNK_M),
                    merged[0],
                    merged[1],
                    merged[2],
                    v_scale,
                    first_token,
                    query_len,
                    kv_head,
                    tokens,
                    layer,
                    strides,
                    HEAD_SIZE,
                    DIMS,
                    GROUP,
                    SINKS,
                )


@triton.jit
def _blocks_of(
    tile_place, table, first_seen, context, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr
):
    """Blocks [TILE] of the cached tokens from ``tile_place`` on that a query sees."""
    positions = tile_place + tl.arange(0, TILE)
    cached = (positions >= first_seen) & (positions < context)
    return tl.load(table + positions // BLOCK_SIZE, mask=cached, other=0)


@triton.jit
def _put(
    queries,
    top,
    weight,
    sums,
    v_scale,
    first_token,
    query_len,
    kv_head,
    tokens,
    layer,
    strides,
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,
    GROUP: tl.constexpr,
    SINKS: tl.constexpr,
):
    """Write the attention of ``queries`` where all of their tiles have been added."""
    is_query = queries < query_len * GROUP
    dims = tl.arange(0, DIMS)
    sinks = tl.zeros(queries.shape, tl.float32)
    if SINKS:
        heads = kv_head * GROUP + queries % GROUP
        sinks = tl.load(layer.sinks + heads, mask=is_query, other=0.0).to(tl.float32)
    result = finish(top, weight, sums, sinks, v_scale, SINKS)
    at = _place_of(queries, first_token, kv_head, strides.output, GROUP) + dims
    output_dtype: tl.constexpr = tokens.output.dtype.element_ty
    mask = is_query[:, None] & (dims < HEAD_SIZE)
    tl.store(tokens.output + at, result.to(output_dtype), mask=mask)


@triton.jit
def _merge(
    start,
    first,
    last,
    share,
    item_place,
    scratch,
    DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_M: tl.constexpr,
):
    """What the programs ``first`` to ``last`` have left of CHUNK_M queries from ``start`` on."""
    places = start + tl.arange(0, CHUNK_M)
    dims = tl.arange(0, DIMS)
    top = tl.full([CHUNK_M], LOWEST, tl.float32)
    weight = tl.zeros([CHUNK_M], tl.float32)
    sums = tl.zeros([CHUNK_M, DIMS], tl.float32)
    for chunk in range(first, last + 1, CHUNK):
        program = chunk + tl.arange(0, CHUNK)
        slot = 2 * program + (program * share < item_place).to(tl.int32)
        at = slot[:, None] * BLOCK_M + places
        left = (program <= last)[:, None] & (places < BLOCK_M)
        tops = tl.load(scratch.tops + at, mask=left, other=LOWEST, cache_modifier=".cg")
        weights = tl.load(scratch.weights + at, mask=left, other=0.0, cache_modifier=".cg")
        parts = tl.load(
            scratch.sums + at[:, :, None] * DIMS + dims,
            mask=left[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        kept = tl.exp2(top - new_top)
        factors = tl.exp2(tops - new_top)
        weight = weight * kept + tl.sum(weights * factors, axis=0)
        sums = sums * kept[:, None] + tl.sum(parts * factors[:, :, None], axis=0)
        top = new_top
    return top, weight, sums


@triton.jit
def _place_of(queries, first_token, kv_head, stride, GROUP: tl.constexpr):
    """Offsets [queries, 1] of the heads of ``queries`` in the query or output tensor."""
    token = first_token.to(tl.int64) + queries // GROUP
    return (token * stride[0] + (kv_head * GROUP + queries % GROUP) * stride[1])[:, None]

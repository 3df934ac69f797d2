"""Decode attention over a paged KV cache, which it also writes; splits are merged in the launch.

The KV tiles of all rows and heads are numbered in one sequence, and each program takes an equal
share of it. So the grid depends on no length: the programs read ``seq_lens`` on the device. An
*item* is one row, KV head and block of queries; a *piece* is the part of an item in one program's
share. An item of one piece is written at once; otherwise the last of its programs to arrive merges
the pieces in order (``winner.py`` has the memory order).

The step's new tokens are never read from the cache: the piece with the item's last tile takes them
from ``key`` and ``value`` and writes them to their slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusedstep.kernels.attention_new import add_new
from fusedstep.kernels.attention_output import head_offsets, merge, write_output
from fusedstep.kernels.attention_pairs import add_pairs, as_half, pair_scores
from fusedstep.kernels.attention_rotary import load_rotated
from fusedstep.kernels.attention_tile import LOWEST, add_tile, scores
from fusedstep.kernels.winner import arrive


@triton.jit
def _span(seq_len, query_len, TILE: tl.constexpr, WINDOW: tl.constexpr):
    """(context, first_seen, first_tile, num_tiles) of a row.

    ``context`` is the number of cached tokens, ``first_seen`` the first that a query sees, in
    ``first_tile``. There is one tile at least: the row's new tokens need a piece to be in.
    """
    context = tl.maximum(seq_len - query_len, 0)
    first_seen = context * 0
    if WINDOW > 0:
        first_seen = tl.maximum(context - WINDOW + 1, 0)
    first_tile = first_seen // TILE
    num_tiles = tl.maximum((context + TILE - 1) // TILE - first_tile, 1)
    return context, first_seen, first_tile, num_tiles


@triton.jit
def _tiles_of(
    row_ids,
    rows,
    num_rows,
    QUERY_LEN: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Tiles of these rows, for each KV head and block of queries; 0 of a row not in the batch."""
    in_batch = row_ids < num_rows
    seq_lens = tl.load(rows.seq_lens + row_ids, mask=in_batch, other=0)
    query_lens = 1
    if QUERY_LEN > 1:
        starts = tl.load(rows.starts + row_ids, mask=in_batch, other=0)
        query_lens = tl.load(rows.starts + row_ids + 1, mask=in_batch, other=0) - starts
    _, _, _, num_tiles = _span(seq_lens, query_lens, TILE, WINDOW)
    return tl.where(in_batch, num_tiles, 0)


@triton.jit(do_not_specialize=["num_rows"])
def attend_kernel(
    tokens,  # query, key, value, output: [num_tokens, heads, HEAD_SIZE]
    cache_ptr,  # [num_blocks, NUM_KV_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE], any strides but the last
    rows,  # block_table [num_rows, n], seq_lens [num_rows], slots [num_tokens], starts
    layer,  # alibi_slopes, sinks: [heads]; k_scale, v_scale: [1] float32; each may be unused
    rotation,  # as ``load_rotated`` takes it; unused unless ROTARY_DIM
    scratch,  # arrivals, zero between launches; piece_max, weights, sums: two pieces a program
    strides,
    num_rows,
    scale,  # of the scores
    soft_cap,  # unused unless SOFT_CAP
    HEAD_SIZE: tl.constexpr,
    DIMS: tl.constexpr,  # HEAD_SIZE up to a power of two
    GROUP: tl.constexpr,  # query heads per KV head
    NUM_KV_HEADS: tl.constexpr,
    QUERY_LEN: tl.constexpr,  # most new tokens of a row; if 1, row i has token i
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,  # tokens that a query sees, itself included; 0: all
    SOFT_CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    SINKS: tl.constexpr,
    FP8_MAX: tl.constexpr,  # largest number of the cache's dtype; 0: not quantised
    PRECISION: tl.constexpr,  # of tl.dot on float32
    ROWS: tl.constexpr,  # a power of two, at least num_rows
    LANES: tl.constexpr,  # that count the tiles of ROWS
    BLOCK_M: tl.constexpr,  # queries (token, head) per item
    M_BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
    NEW_FIRST: tl.constexpr,  # new tokens before the cached ones, keys in a layout of their own
    PAIRED: tl.constexpr,  # the cache is loaded as pairs of dims
    ROTARY_DIM: tl.constexpr,  # of queries and new keys, which are rotated here; 0: not rotated
    QK_NORM: tl.constexpr,  # and normed before
    ROUNDED: tl.constexpr,
    MIN_TILES: tl.constexpr,  # of a share
    CHUNK: tl.constexpr,  # a merge takes CHUNK pieces of CHUNK_M queries at a time
    CHUNK_M: tl.constexpr,
):
    """Grid (any number of programs): attention of the new tokens; row i's begin at starts[i]."""
    ITEMS: tl.constexpr = NUM_KV_HEADS * M_BLOCKS  # of a row
    program = tl.program_id(0)
    # Each lane of a warp counts the tiles of some neighbouring rows, and each warp those of all:
    # sums over lanes need no barrier.
    row_ids = tl.arange(0, LANES) * (ROWS // LANES)
    row_tiles = ()
    lane_tiles = tl.zeros([LANES], tl.int32)
    for i in tl.static_range(ROWS // LANES):
        tiles = _tiles_of(row_ids + i, rows, num_rows, QUERY_LEN, TILE, WINDOW) * ITEMS
        row_tiles += (tiles,)
        lane_tiles += tiles
    total = tl.sum(lane_tiles, axis=0)
    num_programs = tl.num_programs(0)
    share = tl.maximum((total + num_programs - 1) // num_programs, MIN_TILES)
    tile_index = program * share
    stop = tl.minimum(tile_index + share, total)
    # One sum of two numbers: the rows before tile_index, and their tiles.
    end = tl.cumsum(lane_tiles, axis=0) - lane_tiles
    before = tl.zeros([LANES], tl.int64)
    for i in tl.static_range(ROWS // LANES):
        end += row_tiles[i]
        before += tl.where(end <= tile_index, (row_tiles[i].to(tl.int64) << 32) + 1, 0)
    before = tl.sum(before, axis=0)
    row = before.to(tl.int32)
    row_start = (before >> 32).to(tl.int32)
    while tile_index < stop:
        seq_len = tl.load(rows.seq_lens + row)
        first_token = row
        query_len = 1
        if QUERY_LEN > 1:
            first_token = tl.load(rows.starts + row)
            query_len = tl.load(rows.starts + row + 1) - first_token
        span = _span(seq_len, query_len, TILE, WINDOW)
        num_tiles = span[3]
        item = (tile_index - row_start) // num_tiles
        item_start = row_start + item * num_tiles
        item_stop = item_start + num_tiles
        piece_stop = tl.minimum(stop, item_stop)
        _attend_piece(
            row,
            item,
            (first_token, query_len, tl.minimum(seq_len, query_len)),
            span,
            (program, share, tile_index, piece_stop, item_start, item_stop),
            tokens,
            cache_ptr,
            rows,
            layer,
            rotation,
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
            NEW_FIRST,
            PAIRED,
            ROTARY_DIM,
            QK_NORM,
            ROUNDED,
            CHUNK,
            CHUNK_M,
        )
        tile_index = piece_stop
        if tile_index == row_start + num_tiles * ITEMS:
            row_start = tile_index
            row += 1


@triton.jit
def _attend_piece(
    row,
    item,
    new_tokens,  # the first, how many, and how many of them are in the row
    span,
    bounds,  # program and share; tile_index and stop of the piece, start and stop of the item
    tokens,
    cache_ptr,
    rows,
    layer,
    rotation,
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
    NEW_FIRST: tl.constexpr,
    PAIRED: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    QK_NORM: tl.constexpr,
    ROUNDED: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNK_M: tl.constexpr,
):
    """Attend to the tiles of a piece; write the output if it is the whole item or arrives last."""
    first_token, query_len, num_new = new_tokens
    context, first_seen, first_tile, num_tiles = span
    program, share, tile_index, piece_stop, item_start, item_stop = bounds
    kv_head = item // M_BLOCKS
    m_block = item % M_BLOCKS
    dims = tl.arange(0, DIMS)
    in_head = dims < HEAD_SIZE
    queries = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    is_query = queries < query_len * GROUP
    query_tokens = queries // GROUP
    query_offsets = head_offsets(queries, first_token, kv_head, strides.query, GROUP)
    query_mask = is_query[:, None] & in_head
    if ROTARY_DIM > 0:
        query = load_rotated(
            tokens.query,
            query_offsets,
            query_mask,
            context + query_tokens,
            rotation.query_norm,
            rotation,
            HEAD_SIZE,
            DIMS,
            ROTARY_DIM,
            QK_NORM,
            ROUNDED,
        )
    else:
        query = tl.load(tokens.query + query_offsets + dims, mask=query_mask, other=0.0)
    slopes = tl.zeros([BLOCK_M], tl.float32)
    if ALIBI:
        heads = kv_head * GROUP + queries % GROUP
        slopes = tl.load(layer.alibi_slopes + heads, mask=is_query, other=0.0).to(tl.float32)
    v_scale = 1.0
    if FP8_MAX > 0:
        scale = scale * tl.load(layer.k_scale)
        v_scale = tl.load(layer.v_scale)

    row_max = tl.full([BLOCK_M], LOWEST, tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, DIMS], tl.float32)

    if NEW_FIRST:
        row_max, weight, sums = add_new(
            row_max,
            weight,
            sums,
            query,
            query_tokens,
            slopes,
            (first_token, tl.where(piece_stop == item_stop, num_new, 0), context),
            kv_head,
            m_block,
            tokens,
            cache_ptr,
            rows,
            layer,
            rotation,
            strides,
            scale,
            soft_cap,
            HEAD_SIZE,
            DIMS,
            BLOCK_SIZE,
            WINDOW,
            SOFT_CAP,
            ALIBI,
            FP8_MAX,
            PRECISION,
            ROTARY_DIM,
            QK_NORM,
            ROUNDED,
        )

    if PAIRED:
        halves = tl.arange(0, DIMS // 2)
        in_half = halves < HEAD_SIZE // 2
        pairs_ptr = cache_ptr.to(tl.pointer_type(tl.int16))
        half_query, factor = as_half(query)
        even_query, odd_query = tl.split(tl.reshape(half_query, [BLOCK_M, DIMS // 2, 2]))
        even_sums = tl.zeros([BLOCK_M, DIMS // 2], tl.float32)
        odd_sums = tl.zeros([BLOCK_M, DIMS // 2], tl.float32)

    # The cached tokens, tile by tile; the block numbers of the next tile are loaded ahead.
    table = rows.block_table + row.to(tl.int64) * strides.block_table
    tile_end = tl.minimum(first_tile + piece_stop - item_start, (context + TILE - 1) // TILE)
    first_position = (first_tile + tile_index - item_start) * TILE
    blocks = _blocks_of(first_position, table, first_seen, context, BLOCK_SIZE, WINDOW, TILE)
    for tile_position in range(first_position, tile_end * TILE, TILE):
        positions = tile_position + tl.arange(0, TILE)
        cached = _is_cached(positions, first_seen, context, WINDOW)
        next_blocks = _blocks_of(
            tile_position + TILE, table, first_seen, context, BLOCK_SIZE, WINDOW, TILE
        )
        offsets = blocks.to(tl.int64) * strides.cache[0] + kv_head * strides.cache[1]
        offsets += (positions % BLOCK_SIZE) * strides.cache[2]
        seen = cached[None, :]
        if WINDOW > 0 and QUERY_LEN > 1:
            seen = seen & (context + query_tokens[:, None] - positions < WINDOW)
        tile_mask = cached[:, None] & in_head
        if PAIRED:
            pairs = pairs_ptr + (offsets // 2)[:, None] + halves
            pairs_mask = cached[:, None] & in_half
            tile_scores = pair_scores(
                even_query,
                odd_query,
                tl.trans(tl.load(pairs, mask=pairs_mask, other=0)),
                positions - context,
                slopes,
                scale * factor,
                soft_cap,
                cache_ptr.dtype.element_ty,
                SOFT_CAP,
                ALIBI,
            )
            values = tl.load(pairs + HEAD_SIZE // 2, mask=pairs_mask, other=0)
            row_max, weight, even_sums, odd_sums = add_pairs(
                row_max,
                weight,
                even_sums,
                odd_sums,
                tile_scores,
                seen,
                values,
                cache_ptr.dtype.element_ty,
            )
        else:
            if not NEW_FIRST:
                # Of addresses, for keys and values: computed once, in half the registers.
                keys = tl.load(cache_ptr + offsets[:, None] + dims, mask=tile_mask, other=0.0)
                keys = tl.trans(keys)
            else:
                keys = tl.load(
                    cache_ptr + offsets[None, :] + dims[:, None],
                    mask=cached[None, :] & in_head[:, None],
                    other=0.0,
                )
            values = cache_ptr + HEAD_SIZE + offsets[:, None] + dims
            values = tl.load(values, mask=tile_mask, other=0.0)
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
            row_max, weight, sums = add_tile(
                row_max, weight, sums, tile_scores, seen, values, query, PRECISION
            )
        blocks = next_blocks

    if PAIRED:
        sums = tl.reshape(tl.join(even_sums, odd_sums), [BLOCK_M, DIMS])
    if not NEW_FIRST and piece_stop == item_stop:
        # After the loads of the cached tokens are under way, and only where there are new ones.
        row_max, weight, sums = add_new(
            row_max,
            weight,
            sums,
            query,
            query_tokens,
            slopes,
            (first_token, num_new, context),
            kv_head,
            m_block,
            tokens,
            cache_ptr,
            rows,
            layer,
            rotation,
            strides,
            scale,
            soft_cap,
            HEAD_SIZE,
            DIMS,
            BLOCK_SIZE,
            WINDOW,
            SOFT_CAP,
            ALIBI,
            FP8_MAX,
            PRECISION,
            ROTARY_DIM,
            QK_NORM,
            ROUNDED,
        )

    whole = num_tiles == piece_stop - tile_index
    if whole:
        write_output(
            queries,
            row_max,
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
        # Of a share's pieces only the first and the last can be parts: two entries per program.
        offset = (2 * program + (tile_index != program * share).to(tl.int32)) * BLOCK_M
        offset += tl.arange(0, BLOCK_M)
        stored = is_query | NEW_FIRST
        tl.store(scratch.piece_max + offset, row_max, mask=stored)
        tl.store(scratch.weights + offset, weight, mask=stored)
        tl.store(scratch.sums + offset[:, None] * DIMS + dims, sums, mask=stored[:, None])
        first = item_start // share
        last = (item_stop - 1) // share
        if arrive(row * ITEMS + item, last - first + 1, scratch):
            num_queries = tl.minimum(query_len * GROUP - m_block * BLOCK_M, BLOCK_M)
            for start in range(0, num_queries, CHUNK_M):
                merged = merge(
                    start, first, last, share, item_start, scratch, DIMS, BLOCK_M, CHUNK, CHUNK_M
                )
                write_output(
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
def _is_cached(positions, first_seen, context, WINDOW: tl.constexpr):
    """Positions that some query sees in the cache."""
    cached = positions < context
    if WINDOW > 0:
        cached = cached & (positions >= first_seen)
    return cached


@triton.jit
def _blocks_of(
    first_position,
    table,
    first_seen,
    context,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
):
    """Block numbers [TILE] of the positions from ``first_position`` on; 0 for unseen positions."""
    positions = first_position + tl.arange(0, TILE)
    cached = _is_cached(positions, first_seen, context, WINDOW)
    return tl.load(table + positions // BLOCK_SIZE, mask=cached, other=0)

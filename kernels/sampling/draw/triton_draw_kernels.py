"""The kernels of `triton_draw`.

The state of a row is int32 numbers: the phase, the candidate and the keys of the next pass. A float
is stored as its `sort_key`, an int32 with the same order, or as its bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.sampling.triton_functions import (
    MINUS_INFINITY,
    NO_TOKEN,
    best_noisy,
    best_of_tiles,
    best_plain,
    key_value,
    noise_key,
    sort_key,
)
from kernels.triton_overlap import await_inputs

STATE_SIZE = 16
BINS = 2048
_SIZE: tl.constexpr = tl.constexpr(STATE_SIZE)
_BINS: tl.constexpr = tl.constexpr(BINS)
_LOWEST: tl.constexpr = tl.constexpr(-2139095041)  # sort_key(-inf)
# Indices into the state
_PHASE: tl.constexpr = tl.constexpr(0)
_TOKEN: tl.constexpr = tl.constexpr(1)  # the candidate
_VALUE: tl.constexpr = tl.constexpr(2)  # key of the candidate's scaled logit
_PIVOT: tl.constexpr = tl.constexpr(3)  # key: the next draw takes tokens strictly above it
_ABOVE: tl.constexpr = tl.constexpr(4)  # key: the next pass sums the mass strictly above it
_TARGET: tl.constexpr = tl.constexpr(5)  # bits: keep a token if the mass above it is below this
_HIGHEST: tl.constexpr = tl.constexpr(6)  # key of the highest scaled logit
_MIN_P: tl.constexpr = tl.constexpr(7)  # key of the lowest logit that min-p keeps
_PREFIX: tl.constexpr = tl.constexpr(8)  # digits found so far of the k-th highest, as unsigned
_LEFT: tl.constexpr = tl.constexpr(9)  # its rank among the tokens with these digits, from 1
# Phases
_DONE: tl.constexpr = tl.constexpr(0)
_TOP_K: tl.constexpr = tl.constexpr(1)  # find the k-th highest, then draw from it up
_VERIFY: tl.constexpr = tl.constexpr(2)  # check the candidate


@triton.jit
def _scaled(logits_ptr, allowed_ptr, temperature_ptr, row, ids, logits_stride, allowed_stride, V):
    """Logits after mask and temperature, without NaN and -0; -inf beyond the vocabulary."""
    inside = ids < V
    values = tl.load(logits_ptr + row * logits_stride + ids, mask=inside, other=MINUS_INFINITY)
    if allowed_ptr is not None:
        words = tl.load(allowed_ptr + row * allowed_stride + (ids >> 5), mask=inside, other=0)
        values = tl.where(((words >> (ids & 31)) & 1) != 0, values, MINUS_INFINITY)
    values = tl.where(values == values, values, MINUS_INFINITY)
    temperature = tl.load(temperature_ptr + row)
    if (temperature > 0.0) & (temperature != 1.0):
        values = tl.div_rn(values, temperature)
    return tl.where(values == 0.0, 0.0, values)


@triton.jit
def _draw_tile(
    logits_ptr, allowed_ptr, temperature_ptr, seeds_ptr, positions_ptr,
    highest_ptr, scores_ptr, values_ptr, masses_ptr, tokens_ptr,
    logits_stride, allowed_stride, V, row, tile, num_tiles, pivot, above,
    FIRST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store a tile's highest value (FIRST only), its best noisy token strictly above `pivot`, and
    its mass strictly above `above`, relative to its highest value."""
    at = row * num_tiles + tile
    reach = pivot + 1 if FIRST else sort_key(tl.load(highest_ptr + at))
    if reach > tl.minimum(pivot, above):
        first = tile * TILE
        ids = first + tl.arange(0, TILE)
        values = _scaled(
            logits_ptr, allowed_ptr, temperature_ptr, row, ids, logits_stride, allowed_stride, V
        )
        keys = sort_key(values)
        highest = tl.max(values, axis=0)
        shift = tl.where(highest == MINUS_INFINITY, 0.0, highest)
        mass = tl.sum(tl.where(keys > above, tl.exp(values - shift), 0.0), axis=0)
        eligible = tl.where(keys > pivot, values, MINUS_INFINITY)
        if tl.load(temperature_ptr + row) > 0.0:
            key = noise_key(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
            score, token, value = best_noisy(eligible, ids, first, key)
        else:
            score, token = best_plain(eligible, first)
            value = score
        if FIRST:
            tl.store(highest_ptr + at, highest)
        tl.store(scores_ptr + at, score)
        tl.store(values_ptr + at, value)
        tl.store(masses_ptr + at, mass)
        tl.store(tokens_ptr + at, token)
    else:
        tl.store(scores_ptr + at, MINUS_INFINITY)
        tl.store(values_ptr + at, MINUS_INFINITY)
        tl.store(masses_ptr + at, 0.0)
        tl.store(tokens_ptr + at, NO_TOKEN)


@triton.jit
def _join_tiles(
    highest_ptr, scores_ptr, values_ptr, masses_ptr, tokens_ptr,
    row, num_tiles, TILES: tl.constexpr,
):  # fmt: skip
    """Of a row: its highest value, what masses are relative to, the mass of all tiles, the best
    token and the key of this token's value."""
    tiles = tl.arange(0, TILES)
    inside = tiles < num_tiles
    at = row * num_tiles + tiles
    scores = tl.load(scores_ptr + at, mask=inside, other=MINUS_INFINITY)
    tokens = tl.load(tokens_ptr + at, mask=inside, other=NO_TOKEN)
    values = tl.load(values_ptr + at, mask=inside, other=MINUS_INFINITY)
    masses = tl.load(masses_ptr + at, mask=inside, other=0.0)
    highests = tl.load(highest_ptr + at, mask=inside, other=MINUS_INFINITY)
    highest = tl.max(highests, axis=0)
    shift = tl.where(highest == MINUS_INFINITY, 0.0, highest)
    mass = tl.sum(masses * tl.exp(highests - shift), axis=0)
    _, token = best_of_tiles(scores, tokens)
    value = sort_key(tl.max(tl.where(tokens == token, values, MINUS_INFINITY), axis=0))
    return highest, shift, mass, token, value


@triton.jit
def _decide_row(
    top_k_ptr, top_p_ptr, log_min_p_ptr, temperature_ptr,
    highest_ptr, scores_ptr, values_ptr, masses_ptr, tokens_ptr,
    state_ptr, drawn_ptr, V, row, num_tiles, FIRST: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Join the tile results of a row, then finish the row or set its state for the next pass."""
    state = state_ptr + row * _SIZE
    highest, shift, mass, token, value = _join_tiles(
        highest_ptr, scores_ptr, values_ptr, masses_ptr, tokens_ptr, row, num_tiles, TILES
    )
    top = sort_key(highest)

    top_p = 1.0
    if top_p_ptr is not None:
        top_p = tl.load(top_p_ptr + row)
    no_limit = -MINUS_INFINITY
    phase = _VERIFY
    if FIRST:
        lowest = _LOWEST
        if log_min_p_ptr is not None:
            lowest = sort_key(highest + tl.load(log_min_p_ptr + row))
        target = tl.where(top_p < 1.0, top_p * mass, no_limit)
        plain = (tl.load(temperature_ptr + row) <= 0.0) | (value == top)
        passed = (top_p >= 1.0) & (value >= lowest)
        tl.store(state + _HIGHEST, top)
        tl.store(state + _MIN_P, lowest)
        if top_k_ptr is not None:
            top_k = tl.load(top_k_ptr + row).to(tl.int32)
            passed = passed & (top_k >= V)
            phase = tl.where(top_k < V, _TOP_K, phase)
            tl.store(state + _PREFIX, 0)
            tl.store(state + _LEFT, top_k)
        phase = tl.where(plain | passed, _DONE, phase)
        tl.store(state + _TARGET, target.to(tl.int32, bitcast=True))
    else:
        lowest = tl.load(state + _MIN_P)
        target = tl.load(state + _TARGET).to(tl.float32, bitcast=True)
        if tl.load(state + _PHASE) == _TOP_K:
            # `above` was the k-th highest: add the mass of the best k tokens that equal it.
            share = tl.exp(key_value(tl.load(state + _ABOVE)) - shift)
            kept = mass + tl.load(state + _LEFT).to(tl.float32) * share
            target = tl.where(top_p < 1.0, top_p * kept, no_limit)
            tl.store(state + _TARGET, target.to(tl.int32, bitcast=True))
            accepted = False
            passed = top_p >= 1.0
        else:
            candidate = tl.load(state + _VALUE)
            accepted = (candidate >= lowest) & (mass < target)
            passed = False
        if accepted:
            token = tl.load(state + _TOKEN)
            value = tl.load(state + _VALUE)
        phase = tl.where(accepted | passed | (value == top), _DONE, phase)
    tl.store(drawn_ptr + row, token.to(tl.int64))
    tl.store(state + _TOKEN, token)
    tl.store(state + _VALUE, value)
    tl.store(state + _ABOVE, value)
    tl.store(state + _PIVOT, tl.maximum(value, lowest - 1))
    tl.store(state + _PHASE, phase)


@triton.jit
def draw_kernel(
    logits_ptr,  # [R, V] float32, rows logits_stride apart
    allowed_ptr,  # [R, ceil(V / 32)] int32, rows allowed_stride apart; or None
    temperature_ptr,  # [R] float32
    seeds_ptr,  # [R] int64
    positions_ptr,  # [R] int64
    highest_ptr,  # [R, tiles] float32, and so are the next three: the results of each tile
    scores_ptr,
    values_ptr,
    masses_ptr,
    tokens_ptr,  # [R, tiles] int32
    state_ptr,  # [R, STATE_SIZE] int32
    logits_stride,
    allowed_stride,
    V,
    FIRST: tl.constexpr,
    TILE: tl.constexpr,
):
    """Draw in one tile of one row, grid (tiles, R)."""
    await_inputs()
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if FIRST:
        pivot = _LOWEST
        above = _LOWEST
        phase = _VERIFY
    else:
        state = state_ptr + row * _SIZE
        pivot = tl.load(state + _PIVOT)
        above = tl.load(state + _ABOVE)
        phase = tl.load(state + _PHASE)
    if phase != _DONE:
        _draw_tile(
            logits_ptr, allowed_ptr, temperature_ptr, seeds_ptr, positions_ptr,
            highest_ptr, scores_ptr, values_ptr, masses_ptr, tokens_ptr,
            logits_stride, allowed_stride, V, row, tile, tl.num_programs(0), pivot, above,
            FIRST, TILE,
        )  # fmt: skip


@triton.jit
def decide_kernel(
    top_k_ptr,  # [R] int64 or int32; or None
    top_p_ptr,  # [R] float32; or None
    log_min_p_ptr,  # [R] float32; or None
    temperature_ptr,  # [R] float32
    highest_ptr,  # results of the tiles, as in `draw_kernel`
    scores_ptr,
    values_ptr,
    masses_ptr,
    tokens_ptr,
    state_ptr,  # [R, STATE_SIZE] int32
    drawn_ptr,  # [R] int64 out: the token, final once the row is done
    V,
    num_tiles,
    FIRST: tl.constexpr,
    TILES: tl.constexpr,  # a power of two, at least num_tiles
):
    """Decide after a draw, grid (R,)."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    phase = _VERIFY if FIRST else tl.load(state_ptr + row * _SIZE + _PHASE)
    if phase != _DONE:
        _decide_row(
            top_k_ptr, top_p_ptr, log_min_p_ptr, temperature_ptr,
            highest_ptr, scores_ptr, values_ptr, masses_ptr, tokens_ptr,
            state_ptr, drawn_ptr, V, row, num_tiles, FIRST, TILES,
        )  # fmt: skip


@triton.jit
def finish_kernel(
    logits_ptr,  # as in `draw_kernel` and `decide_kernel`
    allowed_ptr,
    temperature_ptr,
    seeds_ptr,
    positions_ptr,
    top_k_ptr,
    top_p_ptr,
    log_min_p_ptr,
    highest_ptr,
    scores_ptr,
    values_ptr,
    masses_ptr,
    tokens_ptr,
    state_ptr,
    drawn_ptr,
    logits_stride,
    allowed_stride,
    V,
    num_tiles,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    """Draw and decide until the row is done, grid (R,). Every round leaves fewer tokens, and the
    highest is always kept."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * _SIZE
    phase = tl.load(state + _PHASE)
    while phase != _DONE:
        pivot = tl.load(state + _PIVOT)
        above = tl.load(state + _ABOVE)
        tile = 0
        while tile < num_tiles:
            _draw_tile(
                logits_ptr, allowed_ptr, temperature_ptr, seeds_ptr, positions_ptr,
                highest_ptr, scores_ptr, values_ptr, masses_ptr, tokens_ptr,
                logits_stride, allowed_stride, V, row, tile, num_tiles, pivot, above,
                False, TILE,
            )  # fmt: skip
            tile += 1
        tl.debug_barrier()  # other threads read the tile results
        _decide_row(
            top_k_ptr, top_p_ptr, log_min_p_ptr, temperature_ptr,
            highest_ptr, scores_ptr, values_ptr, masses_ptr, tokens_ptr,
            state_ptr, drawn_ptr, V, row, num_tiles, False, TILES,
        )  # fmt: skip
        tl.debug_barrier()
        phase = tl.load(state + _PHASE)


@triton.jit
def count_digits_kernel(
    logits_ptr,  # as in `draw_kernel`
    allowed_ptr,
    temperature_ptr,
    highest_ptr,
    state_ptr,
    counts_ptr,  # [R, BINS] int32, zero before: tokens by their next digit
    logits_stride,
    allowed_stride,
    V,
    SHIFT: tl.constexpr,  # bits after the digit
    BITS: tl.constexpr,  # of the digit
    TILE: tl.constexpr,
):
    """Count the next digit of the values whose leading digits are those found so far,
    grid (tiles, R)."""
    await_inputs()
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    state = state_ptr + row * _SIZE
    if tl.load(state + _PHASE) == _TOP_K:
        prefix = tl.load(state + _PREFIX)
        highest = tl.load(highest_ptr + row * tl.num_programs(0) + tile)
        if _leading(_unsigned(highest), SHIFT + BITS) >= prefix:
            ids = tile * TILE + tl.arange(0, TILE)
            values = _scaled(
                logits_ptr, allowed_ptr, temperature_ptr, row, ids, logits_stride,
                allowed_stride, V,
            )  # fmt: skip
            order = _unsigned(values)
            match = (_leading(order, SHIFT + BITS) == prefix) & (ids < V)
            digit = ((order >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
            counts = tl.histogram(tl.where(match, digit, 0), _BINS, mask=match)
            bins = tl.arange(0, _BINS)
            tl.atomic_add(counts_ptr + row * _BINS + bins, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _unsigned(values):
    """uint32 that order as the floats do."""
    return sort_key(values).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _leading(order, BITS_AFTER: tl.constexpr):
    """The leading digits, int32; 0 when all 32 bits come after them."""
    shifted = order ^ order if BITS_AFTER == 32 else order >> BITS_AFTER
    return shifted.to(tl.int32)


@triton.jit
def choose_digit_kernel(
    state_ptr,  # [R, STATE_SIZE] int32
    counts_ptr,  # [R, BINS] int32 of `count_digits_kernel`
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
):
    """The next digit of the k-th highest value, grid (R,). After the last digit, set the next draw
    to the tokens from that value up."""
    await_inputs()
    row = tl.program_id(0).to(tl.int64)
    state = state_ptr + row * _SIZE
    if tl.load(state + _PHASE) == _TOP_K:
        left = tl.load(state + _LEFT)
        bins = tl.arange(0, _BINS)
        counts = tl.load(counts_ptr + row * _BINS + bins)
        from_top = tl.cumsum(counts, axis=0, reverse=True)  # tokens with this digit or a higher
        digit = tl.sum((from_top >= left).to(tl.int32), axis=0) - 1
        left -= tl.sum(tl.where(bins > digit, counts, 0), axis=0)
        prefix = (tl.load(state + _PREFIX).to(tl.uint32, bitcast=True) << BITS) | digit.to(
            tl.uint32
        )
        tl.store(state + _LEFT, left)
        tl.store(state + _PREFIX, prefix.to(tl.int32, bitcast=True))
        if SHIFT == 0:
            lowest_kept = (prefix ^ 0x80000000).to(tl.int32, bitcast=True)
            lowest = tl.maximum(lowest_kept, tl.load(state + _MIN_P))
            tl.store(state + _ABOVE, lowest_kept)
            tl.store(state + _PIVOT, tl.maximum(lowest - 1, _LOWEST))

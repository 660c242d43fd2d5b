"""Device functions of the sampling kernels: noise, ordering of floats, the best of a tile."""

from __future__ import annotations

import triton
import triton.language as tl

MINUS_INFINITY: tl.constexpr = tl.constexpr(float("-inf"))
NO_TOKEN: tl.constexpr = tl.constexpr(2**31 - 1)
NO_KEY: tl.constexpr = tl.constexpr(-(2**63))  # below every packed_key


@triton.jit
def mix64(x):
    """The splitmix64 finaliser on uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def noise_key(seed, position):
    """The 64-bit key of an (int64 seed, int64 position), as uint64."""
    golden = 0x9E3779B97F4A7C15
    return mix64(mix64(seed.to(tl.uint64) + golden) + (position.to(tl.uint64) + 1) * golden)


@triton.jit
def fmix32(x):
    """The murmur3 finaliser on uint32."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def noise_bits(key, tokens):
    """Uniform uint32 of a uint64 key and int32 token ids."""
    low = (key & 0xFFFFFFFF).to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    return fmix32(fmix32(tokens.to(tl.uint32) * 0x9E3779B1 + low) ^ high)


@triton.jit
def uniform(bits):
    """(bits + 1/2) / 2^32 in float32; may round up to 1."""
    return (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10


@triton.jit
def gumbel(bits):
    """-log(-log(1 - v)), v = uniform(bits). Both logarithms are rounded from float64 to float32.
    That costs little: `best_noisy` computes the noise of few tokens."""
    v = tl.minimum(uniform(bits), 0.999999940395355224609375).to(tl.float64)
    rest = 1.0 - v
    taken = 1.0 - rest  # v before 1 - v was rounded: Kahan's log1p
    waited = -tl.log(rest) * v / tl.where(taken == 0.0, 1.0, taken)
    waited = tl.where(taken == 0.0, v, waited).to(tl.float32)
    return -tl.log(waited.to(tl.float64)).to(tl.float32)


@triton.jit
def waiting_bound(bits):
    """At least `gumbel(bits)`, at most 0.06 above -log(v), v = uniform(bits).

    -log(-log(1 - v)) is at most -log(v), and the bits of a float32, read as an integer and scaled,
    are a chord below its log2.
    """
    chord = uniform(bits).to(tl.int32, bitcast=True).to(tl.float32) * 1.1920928955078125e-07
    return (127.0 - chord) * 0.6931471805599453


@triton.jit
def sort_key(x):
    """int32 that order as the float32 numbers do (no NaN, no -0)."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_value(key):
    """The float32 of a `sort_key`."""
    bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def packed_key(values, ids):
    """int64 that order by value, then by lower id. NaN counts as -inf."""
    known = tl.where(values == values, values, MINUS_INFINITY)
    keys = sort_key(tl.where(known == 0.0, 0.0, known)).to(tl.int64)
    return (keys << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def packed_id(keys):
    """The int32 id in a `packed_key`."""
    return 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def packed_value(keys):
    """The float32 value in a `packed_key`."""
    return key_value((keys >> 32).to(tl.int32))


@triton.jit
def best_plain(values, first):
    """(highest value, its token id; the lowest id among equals). The values belong to token ids
    first, first + 1, ... and are not NaN."""
    best, at = tl.max(values, axis=0, return_indices=True)
    return best, first + at


@triton.jit
def best_noisy(values, ids, first, key):
    """(highest values + Gumbel noise, its token id, its value); the lowest id among equals.

    `waiting_bound` bounds the noise without a logarithm. Tokens get their exact noise in the order
    of their bounds, until no bound reaches the best score: seldom more than two tokens. `ids` are
    first, first + 1, ...; a value of -inf is chosen only if all are -inf.
    """
    slack = 1e-4 + tl.abs(values) * 1e-6  # rounding of the bound, and of the sum
    bound = values + waiting_bound(noise_bits(key, ids)) + slack
    bound = tl.where(values == MINUS_INFINITY, MINUS_INFINITY, bound)
    top, at = tl.max(bound, axis=0, return_indices=True)
    token = first + at
    value = tl.max(tl.where(ids == token, values, MINUS_INFINITY), axis=0)
    score = value + gumbel(noise_bits(key, token))
    bound = tl.where(ids == token, MINUS_INFINITY, bound)
    top, at = tl.max(bound, axis=0, return_indices=True)
    while (top > MINUS_INFINITY) & (top >= score):
        next_token = first + at
        next_value = tl.max(tl.where(ids == next_token, values, MINUS_INFINITY), axis=0)
        next_score = next_value + gumbel(noise_bits(key, next_token))
        better = (next_score > score) | ((next_score == score) & (next_token < token))
        token = tl.where(better, next_token, token)
        value = tl.where(better, next_value, value)
        score = tl.where(better, next_score, score)
        bound = tl.where(ids == next_token, MINUS_INFINITY, bound)
        top, at = tl.max(bound, axis=0, return_indices=True)
    return score, token, value


@triton.jit
def best_of_tiles(scores, tokens):
    """(highest score, lowest token that has it)."""
    best = tl.max(scores, axis=0)
    return best, tl.min(tl.where(scores == best, tokens, NO_TOKEN), axis=0)

"""Bit-shift trellis codes: every weight is a function of a window of L bits that slides over the code, K bits per weight.

The idea is that of QTIP (Tseng et al. 2024, arXiv 2406.11235): trellis coded quantization (Marcellin and Fischer 1990) whose
trellis is a shift register and whose values are computed, so that no codebook is stored. A row of T numbers is T * K bits on a
ring. Step t of n = T / V reads V numbers from the state s_t, which holds the last L bits up to and with the step's own K * V:

    s_t = (s_{t-1} << KV | c_t) mod 2^L,    s_{-1} = s_{n-1}                            c_t: the KV bits of the step

The ring is closed (tail-biting), so a row costs exactly T * K bits and every number can be decoded without those before it.

Where we depart from QTIP: its values are sums of bytes of a hash, as good as random Gaussian ones. Here a state is multiplied by
an odd number, which permutes the 2^L states, and the result u is read as a quantile of the normal distribution,

    u = (multiplier * s) mod 2^L,    p = (2 u + 1) / 2^L - 1,    value = p (a_0 + a_1 p^2) / (1 + b_1 p^2 + b_2 p^4)

a fit of Phi^-1((1 + p) / 2), times a gain. Every value is taken once, and both the 2^KV states that follow a state and those that
precede one spread evenly over the distribution, as subsets of a classical trellis code do. On Gaussian numbers this loses 5 % (2
bits), 8 % (3) and 10 % (4) less than a table of random Gaussian values at L = 12; ``benchmarks/trellis.py`` measures it. The
multipliers are the best of some hundred random ones among those whose error falls with every bit of state; for single numbers a
thousand more were no better, nor were permutations by polynomials of degree two.

Integers are exact, and the floats are one rounding per operation in the order written, so that values are the same everywhere.

Letters: R rows, T numbers of a row, V of them per step, S = 2^L states, Q = 2^(L - KV) states without their last step, A = 2^KV.
"""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dqtk.spec.trellis import Trellis

# By (bits, vector): odd multipliers of 16-bit states, one for each number of a step. Shorter states take the upper bits.
MULTIPLIERS = {
    (1, 1): (30291,),
    (2, 1): (17065,),
    (3, 1): (8633,),
    (4, 1): (20469,),
    (1, 2): (19657, 36361),
    (2, 2): (8753, 30999),
    (3, 2): (58629, 29737),
    (4, 2): (62933, 60609),
}
GAIN = {1: 29 / 32, 2: 33 / 32, 3: 69 / 64, 4: 9 / 8}  # by bits: the spread of values that serves a source of variance 1 best
NUMERATOR = (1223 / 1024, -297 / 256)
DENOMINATOR = (-11 / 8, 197 / 512)
SEARCH_BYTES = 256 << 20  # of ``encode``: rows are taken so many at a time


def multipliers(trellis: Trellis) -> tuple[int, ...]:
    """Odd, below 2^L, one for each number of a step."""
    return tuple(m >> (16 - trellis.state_bits) | 1 for m in MULTIPLIERS[trellis.bits, trellis.vector])


def curve(trellis: Trellis) -> tuple[float, float, float, float]:
    """(a_0, a_1, b_1, b_2) with the gain in the first two; exact in float32."""
    gain = GAIN[trellis.bits]
    return NUMERATOR[0] * gain, NUMERATOR[1] * gain, *DENOMINATOR


def values(trellis: Trellis, device: torch.device | str = "cpu") -> Tensor:
    """float32 [S, V]: what each state stands for, for a source of mean 0 and variance 1.

    Their standard deviation is ``GAIN``, not 1: what serves a source of variance 1 best (below it at one bit, where rate-distortion
    theory has 1 - D; above it at more bits, where short states need wide tails). The numbers are kept: do not write to them.
    """
    if torch.compiler.is_compiling():  # a part of the graph
        return _values(trellis, device)
    return _kept_values(trellis, torch.device(device))


@cache
def _kept_values(trellis: Trellis, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _values(trellis, device)


def _values(trellis: Trellis, device: torch.device | str) -> Tensor:
    return values_of(torch.arange(trellis.states, dtype=torch.int32, device=device), trellis)


def values_of(states: Tensor, trellis: Trellis) -> Tensor:
    """float32 [..., V] of integer states [...]."""
    factors = torch.tensor(multipliers(trellis), dtype=torch.int64, device=states.device)
    u = states.long()[..., None] * factors & (trellis.states - 1)
    p = (2 * u + (1 - trellis.states)).float() * 2.0**-trellis.state_bits
    a_0, a_1, b_1, b_2 = curve(trellis)
    q = p * p
    return p * (a_0 + q * a_1) / (1 + q * (b_1 + q * b_2))


# --- states, bits and numbers ----------------------------------------------------------------------------------------


def num_steps(trellis: Trellis, length: int) -> int:
    """n = T / V of rows of ``length`` numbers.

    Raises ``ValueError`` where V does not divide T, or the ring has fewer than L bits.
    """
    if length % trellis.vector:
        raise ValueError(
            f"num_steps: length must be a multiple of the {trellis.vector} numbers of a step, got {length}. Use vector=1."
        )
    if length * trellis.bits < trellis.state_bits:
        raise ValueError(
            f"num_steps: length must give the ring at least the {trellis.state_bits} bits of a state at {trellis.bits} bits each, "
            f"got {length}. Use longer rows or fewer state_bits."
        )
    return length // trellis.vector


def packed_width(trellis: Trellis, length: int) -> int:
    """Bytes of a row of ``length`` numbers: T * K bits, the last byte filled with zeros."""
    return -(-num_steps(trellis, length) * trellis.step_bits // 8)


def pack(states: Tensor, trellis: Trellis) -> Tensor:
    """The bits of the ring, c_0 first, each c_t and each byte from its highest bit on.

        2 bits:  byte 0 = c_0 << 6 | c_1 << 4 | c_2 << 2 | c_3        3 bits:  byte 0 = c_0 << 5 | c_1 << 2 | c_2 >> 1

    Where the row does not fill its last byte, the low bits of that are zero.

    Args:
        states: integers [R, n] as ``encode`` gives them.
    Returns:
        uint8 [R, packed_width(trellis, n V)].
    Raises:
        ValueError: where the states are not those of a closed ring.
    """
    n = num_steps(trellis, states.shape[1] * trellis.vector)
    symbols = states.to(torch.int32) & ((1 << trellis.step_bits) - 1)
    if not torch.equal(_windows(symbols, trellis), states.to(torch.int32)):
        raise ValueError(
            "pack: states must follow each other by shifts and end where they began, got others. Pass what encode returned."
        )
    bits = symbols[..., None] >> _shifts(trellis.step_bits, states.device) & 1
    bits = F.pad(bits.flatten(1), (0, -n * trellis.step_bits % 8)).unflatten(1, (-1, 8))
    return (bits << _shifts(8, states.device)).sum(-1).to(torch.uint8)


def unpack(packed: Tensor, trellis: Trellis, length: int) -> Tensor:
    """Inverse of ``pack``: int32 states [R, n] of rows of ``length`` numbers. Compiles without graph breaks."""
    n, step_bits = num_steps(trellis, length), trellis.step_bits
    bits = (packed[..., None].to(torch.int32) >> _shifts(8, packed.device) & 1).flatten(1)[:, : n * step_bits]
    symbols = (bits.unflatten(1, (n, step_bits)) << _shifts(step_bits, packed.device)).sum(-1, dtype=torch.int32)
    return _windows(symbols, trellis)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(bits - 1, -1, -1, dtype=torch.int32, device=device)


def _windows(symbols: Tensor, trellis: Trellis) -> Tensor:
    """int32 [R, n]: the L bits of a ring that end with each of its steps."""
    states = symbols
    for back in range(1, -(-trellis.state_bits // trellis.step_bits)):
        states = states | symbols.roll(back, dims=1) << (back * trellis.step_bits)
    return states & (trellis.states - 1)


def decode(states: Tensor, trellis: Trellis) -> Tensor:
    """float32 [R, T]: the numbers of integer states [R, n]."""
    return values(trellis, states.device)[states.long()].flatten(1)


# --- tiles -----------------------------------------------------------------------------------------------------------

TILE = (64, 4)  # rows and columns of a stored weight's ring: long rings lose little at their seam, narrow ones pass errors on early


def to_tiles(w_NK: Tensor, tile: tuple[int, int]) -> Tensor:
    """[R, T]: tiles of ``tile`` rows by columns, each row after row, from left to right and then down; filled up with zeros."""
    rows, columns = tile
    n, k = w_NK.shape
    w_NK = F.pad(w_NK, (0, -k % columns, 0, -n % rows))
    return w_NK.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2).flatten(2).flatten(0, 1)


def from_tiles(x_RT: Tensor, n: int, k: int, tile: tuple[int, int]) -> Tensor:
    """[n, k]: inverse of ``to_tiles``."""
    rows, columns = tile
    across = -(-k // columns)
    return x_RT.unflatten(0, (-1, across)).unflatten(2, (rows, columns)).transpose(1, 2).flatten(2).flatten(0, 1)[:n, :k]


# --- the search ------------------------------------------------------------------------------------------------------


def encode(x: Tensor, trellis: Trellis, *, weight: Tensor | None = None) -> Tensor:
    """States of the closed ring with a small weighted squared error: Viterbi's algorithm, twice.

    The best ring would take a search per value of its seam. As in QTIP, a first search of the row, turned by half so that its free
    ends are far from the seam, finds the state there, and a second one is bound to it. (A first search of the seam's surroundings
    alone is quicker and worse: 1.5 % at 2 bits with 24 steps on either side.) Of equal paths that of the lowest states is taken.

    This is the reference, float32 throughout; ``dqtk.kernels.encode_trellis`` is the same at native speed.

    Args:
        x: [R, T], of mean 0 and variance about 1, where ``values`` has its numbers. T K >= L.
        weight: [T] or [R, T], at least 0; None: all ones. Of each row only the ratios matter.
    Returns:
        int32 [R, n].
    Raises:
        ValueError: for a length or a weight that does not fit, and for numbers that are not finite.
    """
    x, weight = search_inputs(x, trellis, weight)
    n = num_steps(trellis, x.shape[1])
    states = torch.empty((x.shape[0], n), dtype=torch.int32, device=x.device)
    for rows in _chunks(x.shape[0], trellis, n):
        states[rows] = _closed(x[rows], None if weight is None else weight[rows], trellis)
    return states


def search_inputs(x: Tensor, trellis: Trellis, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both float32 [R, T], checked; what raises is written at ``encode``."""
    if x.ndim != 2:
        raise ValueError(f"encode: x must be of shape [R, T], got {list(x.shape)}. Flatten it.")
    num_steps(trellis, x.shape[1])
    x = x.float()
    if weight is not None:
        if weight.shape not in (x.shape, x.shape[1:]):
            raise ValueError(f"encode: weight must be of shape [T] or {list(x.shape)}, got {list(weight.shape)}. Expand it.")
        weight = weight.float().expand(x.shape)
        if not (weight.isfinite().all() and (weight >= 0).all()):
            raise ValueError("encode: weight must be finite and at least 0, got others. Clamp it.")
    if not x.isfinite().all():
        raise ValueError("encode: x must be finite, got NaN or infinity. Look for the layer's broken weights.")
    return x, weight


def _chunks(rows: int, trellis: Trellis, n: int) -> Iterator[slice]:
    per_row = trellis.states * 24 + (trellis.states >> trellis.step_bits) * n  # costs and temporaries; back pointers
    size = max(1, SEARCH_BYTES // per_row)
    for first in range(0, rows, size):
        yield slice(first, first + size)


def _closed(x: Tensor, weight: Tensor | None, trellis: Trellis) -> Tensor:
    n = x.shape[1] // trellis.vector
    half = (n + 1) // 2  # steps before the seam in the first search
    turn = -((n - half) * trellis.vector)
    first = _search(x.roll(turn, 1), None if weight is None else weight.roll(turn, 1), trellis, None)
    seam = first[:, half - 1] & ((trellis.states >> trellis.step_bits) - 1)
    return _search(x, weight, trellis, seam)


def _search(x: Tensor, weight: Tensor | None, trellis: Trellis, seam: Tensor | None) -> Tensor:
    """int32 [R, n]: the path of least cost.

    ``seam`` [R]: the L - KV bits before the first step and at the end of the last state; None: both ends are free.
    """
    suffixes = trellis.states >> trellis.step_bits
    branches = 1 << trellis.step_bits
    x, table = x.unflatten(1, (-1, trellis.vector)), values(trellis, x.device)
    weight = None if weight is None else weight.unflatten(1, (-1, trellis.vector))
    state = torch.arange(trellis.states, dtype=torch.int32, device=x.device)
    number = torch.arange(branches, dtype=torch.uint8, device=x.device)[:, None]

    def error(step: int) -> Tensor:
        """[R, S], in the order that the native kernel has too: bit-equal sums are what keeps both searches the same."""
        total = None
        for i in range(trellis.vector):
            part = (x[:, step, i, None] - table[:, i]).square()
            part = part if weight is None else part * weight[:, step, i, None]
            total = part if total is None else total + part
        assert total is not None
        return total

    cost, back = error(0), []
    if seam is not None:
        cost = cost.masked_fill(state >> trellis.step_bits != seam[:, None], torch.inf)
    for step in range(1, x.shape[1]):
        paths = cost.unflatten(1, (branches, suffixes))
        best = paths.amin(1)
        back.append(torch.where(paths == best[:, None], number, branches - 1).amin(1))  # the first of equals
        cost = best.repeat_interleave(branches, dim=1) + error(step)
    if seam is not None:
        cost = cost.masked_fill(state & (suffixes - 1) != seam[:, None], torch.inf)
    at = torch.where(cost == cost.amin(1, keepdim=True), state, trellis.states).amin(1)
    path = [at]
    for came_from in reversed(back):
        suffix = at >> trellis.step_bits
        at = came_from.gather(1, suffix.long()[:, None])[:, 0].int() << (trellis.state_bits - trellis.step_bits) | suffix
        path.append(at)
    return torch.stack(path[::-1], 1)

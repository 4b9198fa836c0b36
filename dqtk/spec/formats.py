"""How one tensor is stored or rounded: number format, granularity, how its range is found."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise

from .frozen import frozen
from .trellis import Trellis

ROLE = "{role}"  # in the name of a group of layers: what a plan puts each layer's role in place of


def ascends(values: Sequence[float]) -> bool:
    """Whether numbers are finite and every one is larger than the one before it, as edges between intervals must be."""
    return all(map(math.isfinite, values)) and all(a < b for a, b in pairwise(values))


# --- number formats --------------------------------------------------------------------------------------------------


@frozen
class Int:
    """``bits``-bit integers (2 to 8).

    Symmetric: codes -(2^(b-1)-1) .. 2^(b-1)-1, zero is code 0. Asymmetric: 2^b codes and a zero point.
    """

    bits: int
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.bits, int) and 2 <= self.bits <= 8):
            raise ValueError(
                f"Int: bits must be an integer from 2 to 8, got {self.bits!r}. Use None in place of the spec to keep 16 bits."
            )


@frozen
class Float:
    """Small floating point: ``exponent`` and ``mantissa`` bits and, if ``signed``, a sign; 3 to 8 bits in all.

    The values are those of the OCP types where these exist: E4M3 to 448, E5M2 to 57344 (``torch.float8_e4m3fn``, ``float8_e5m2``;
    their codes for infinity and NaN are not used), E3M2 to 28, E2M3 to 7.5, E2M1 to 6. In every other split all codes are
    numbers, with subnormals, and the bias is 2^(exponent-1) - 1; scales make it irrelevant. E1M2 times 2 is symmetric
    Int(bits=4). Without a sign the range may begin below 0 (inputs after SiLU and GELU do): ``x ~ scale * (value - zero)``.
    """

    exponent: int = 4
    mantissa: int = 3
    signed: bool = True

    def __post_init__(self) -> None:
        whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (self.exponent, self.mantissa))
        if not (whole and 1 <= self.exponent <= 7 and self.mantissa >= 0 and 3 <= self.bits <= 8):
            raise ValueError(
                f"Float: (exponent, mantissa) must be at least (1, 0), at most 7 and with 3 to 8 bits in all, "
                f"got ({self.exponent}, {self.mantissa}). For example Float(exponent=2, mantissa=1), which is FP4."
            )

    @property
    def bits(self) -> int:
        return int(self.signed) + self.exponent + self.mantissa


@frozen
class BestFloat:
    """The ``Float`` of these bits whose exponent/mantissa split loses least, found per tensor when the layer is solved.

    What is stored names the split that was found (Kuzmin et al. 2022, arXiv 2208.09225; 2408.06995).
    """

    bits: int = 4
    signed: bool = True

    def __post_init__(self) -> None:
        if not (isinstance(self.bits, int) and 3 <= self.bits <= 8):
            raise ValueError(f"BestFloat: bits must be an integer from 3 to 8, got {self.bits!r}. Use BestFloat(bits=4).")

    @property
    def splits(self) -> tuple[Float, ...]:
        """Every split with these bits, most exponent bits first."""
        free = self.bits - int(self.signed)
        return tuple(Float(exponent=e, mantissa=free - e, signed=self.signed) for e in range(min(free, 5), 0, -1))


@frozen
class Codebook:
    """Codes that name entries of a table: NF4, logarithmic grids, BitMoD. ``numerics/codebook.py`` makes the known ones.

    tables: 4 to 256 ascending values each, a power of two of them, the same for all. Where there are several, every group of
    weights takes the one that loses least, and its number is stored; a calibrated input takes one for all. name: for people.
    """

    tables: tuple[tuple[float, ...], ...]
    name: str = ""

    def __post_init__(self) -> None:
        if not (isinstance(self.tables, tuple) and all(isinstance(table, tuple) for table in self.tables)):
            raise ValueError(
                f"Codebook: tables must be a tuple of tuples, got {self.tables!r}. For example ((-1.0, -0.3, 0.3, 1.0),)."
            )
        sizes = {len(table) for table in self.tables}
        rising = all(ascends(table) for table in self.tables)
        if len(sizes) != 1 or sizes & {4, 8, 16, 32, 64, 128, 256} != sizes or not rising or not 1 <= len(self.tables) <= 16:
            got = f"{len(self.tables)} of sizes {sorted(sizes)}" + ("" if rising else ", some not ascending or not finite")
            raise ValueError(
                f"Codebook: tables must be 1 to 16 ascending lists of 4, 8, 16 ... 256 finite values, got {got}. "
                "For example nf4() of dqtk.numerics.codebook."
            )

    @property
    def bits(self) -> int:
        return (len(self.tables[0]) - 1).bit_length()


@frozen
class VectorCodebook:
    """Codes that name words: ``length`` consecutive inputs at once, of a weight only. A weight is the sum of one word of each book.

    The books are learned with the layer and stored with it, ``words`` each (a power of two from 4 to 65536). One book: vector
    quantization as in VQ4DiT (Deng et al. 2024, arXiv 2408.17131); several: additive quantization as in VQDM (Egiazarian et al.
    2024, arXiv 2409.00492). Bits per weight must be whole: books * log2(words) / length, 1 to 8.

    group: name of books that all layers of a component with this name share, learned on all of them before any is solved, stored
    once at the root of the model. ``{role}`` in it becomes the role of each layer: "{role}" is one group per role. None: own books.
    """

    words: int = 256
    length: int = 8
    books: int = 1
    group: str | None = None

    def __post_init__(self) -> None:
        if self.group is not None and not re.fullmatch(r"\w+", self.group.replace(ROLE, "role")):
            raise ValueError(
                f"VectorCodebook: group must be letters, digits and underscores, with {ROLE} in it or not, got {self.group!r}. "
                "For example group='{role}', or None for books of the layer's own."
            )
        if self.words not in [2**bits for bits in range(2, 17)]:
            raise ValueError(
                f"VectorCodebook: words must be 4, 8, 16 ... 65536, got {self.words!r}. Codes have 2 to 16 bits; take more books."
            )
        if not (isinstance(self.length, int) and self.length in (1, 2, 3, 4, 6, 8, 12, 16)):
            raise ValueError(
                f"VectorCodebook: length must be 1, 2, 3, 4, 6, 8, 12 or 16, got {self.length!r}. The usual ones are 4 and 8."
            )
        if not (isinstance(self.books, int) and 1 <= self.books <= 8):
            raise ValueError(
                f"VectorCodebook: books must be an integer from 1 to 8, got {self.books!r}. The usual number is 1 to 4."
            )
        bits = self.books * self.code_bits
        if bits % self.length or bits > 8 * self.length:
            raise ValueError(
                f"VectorCodebook: books * log2(words) / length must be a whole number of bits from 1 to 8, got {bits} / "
                f"{self.length}. For example words=256, length=8, books=3, which is 3 bits."
            )

    @property
    def code_bits(self) -> int:
        """Bits of one code."""
        return (self.words - 1).bit_length()

    @property
    def bits(self) -> int:
        """Bits per weight that codes take."""
        return self.books * self.code_bits // self.length


# --- granularities: which numbers share one scale --------------------------------------------------------------------


@frozen
class PerTensor:
    """One scale for the whole tensor. Scale shape [1]."""


@frozen
class PerLevel:
    """Calibrated inputs only: one scale per interval of the noise level, for the whole tensor. Scale shape [number of intervals].

    edges: between the intervals, ascending, in the denoiser's own time; none: at most ``most`` intervals are found when the model
    is quantized, cut where the ranges of its inputs drift, and a layer whose range hardly drifts becomes ``PerTensor``. (Scales per
    step: EfficientDM, He et al. 2023, arXiv 2310.03270, section 3.3; a finite set of steps: TFMQ-DM, arXiv 2311.16503.)
    """

    most: int = 8
    edges: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not (isinstance(self.most, int) and 2 <= self.most <= 64):
            raise ValueError(f"PerLevel: most must be an integer from 2 to 64, got {self.most!r}. Use PerTensor() for one scale.")
        if not ascends(self.edges):
            raise ValueError(f"PerLevel: edges must be finite and ascending, got {list(self.edges)}. Leave them out to find them.")

    @property
    def count(self) -> int:
        """Number of intervals; the most there may be while they are not found."""
        return len(self.edges) + 1 if self.edges else self.most


@frozen
class PerChannel:
    """One scale per output channel of a weight [N, K]. Scale shape [N, 1]."""


@frozen
class PerToken:
    """One scale per token (row) of an input [T, K]; per sample for a convolution, whose input has no tokens. Scale shape [T, 1]."""


@frozen
class PerGroup:
    """One float scale per ``size`` consecutive inputs of each output channel. Scale shape [N, K / size]."""

    size: int = 64

    def __post_init__(self) -> None:
        _check_group(type(self).__name__, self.size)


@frozen
class TwoLevel:
    """Groups whose scales are small integers times one float per output channel, so that every weight is an int8 number.

    weight[n, k] = scale[n] * group_scale[n, k // size] * code[n, k], with |group_scale * code| <= 127: one int8 matmul serves
    the whole layer although the groups differ (the "progressive" quantization of QServe, Lin et al. 2024, arXiv 2405.04532,
    section 4.1; here symmetric in both levels, and group scales are chosen by error, not by absmax). Scale shapes [N, 1] float and
    [N, K / size] uint8.
    """

    size: int = 64

    def __post_init__(self) -> None:
        _check_group(type(self).__name__, self.size)


@frozen
class E8M0Group:
    """Microscaling (OCP MX 1.0): one power of two per ``size`` consecutive inputs, stored as its exponent in a byte. MXFP4, MXFP8.

    ``saturate``: the exponent that MX prescribes, floor(log2 absmax) - floor(log2 largest), under which the largest numbers may
    be cut off; else the next one, under which none is. An ``MSE`` range takes the best of three. Scale shape [N, K / size] uint8.
    """

    size: int = 32
    saturate: bool = True

    def __post_init__(self) -> None:
        _check_group(type(self).__name__, self.size)


@frozen
class E4M3Group:
    """One positive E4M3 scale per ``size`` consecutive inputs, times one float32 per weight (per token of an input). NVFP4.

    An ``MSE`` range tries every E4M3 number for every group. Scale shapes [1, 1] float32 and [N, K / size] float8_e4m3fn.
    """

    size: int = 16

    def __post_init__(self) -> None:
        _check_group(type(self).__name__, self.size)


def _check_group(where: str, size: int) -> None:
    if not (isinstance(size, int) and size >= 8 and size % 8 == 0):
        raise ValueError(f"{where}: size must be a positive multiple of 8, got {size!r}. The usual sizes are 32, 64 and 128.")


# --- how a range is found --------------------------------------------------------------------------------------------


@frozen
class AbsMax:
    """The largest magnitude (symmetric) or the least and largest value (asymmetric) of the numbers that share a scale."""


@frozen
class MSE:
    """The range among ``steps`` multiples of the absmax range, from ``most`` down to ``least``, with the least squared error.

    Above 1 it pays for floating-point grids, whose error repeats with every factor of two. In microscaling groups ``MSE``
    searches what there is to search (see ``E8M0Group`` and ``E4M3Group``) and the numbers here do not matter.
    """

    steps: int = 16
    least: float = 0.4
    most: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.steps, int) and self.steps >= 2 and 0 < self.least < 1):
            raise ValueError(
                f"MSE: steps must be at least 2 and least in (0, 1), got steps={self.steps!r}, least={self.least!r}. Use MSE()."
            )
        if not 1 <= self.most <= 2:
            raise ValueError(f"MSE: most must be from 1 to 2, got {self.most!r}. Use MSE().")


@frozen
class Dynamic:
    """Inputs only: absmax of each token (or of each group of its inputs), found anew at every call. Needs no calibration."""


Format = Int | Float | BestFloat | Codebook | VectorCodebook | Trellis
Granularity = PerTensor | PerLevel | PerChannel | PerToken | PerGroup | TwoLevel | E8M0Group | E4M3Group
Range = AbsMax | MSE | Dynamic
STATIC = (PerTensor, PerLevel)  # granularities of an input whose range is calibrated
VECTORS = (VectorCodebook, Trellis)  # formats whose codes stand for several weights
GROUPS = (PerGroup, TwoLevel, E8M0Group, E4M3Group)  # granularities with a ``size``


@frozen
class TensorSpec:
    """How one tensor is stored or rounded."""

    format: Format
    granularity: Granularity
    range: Range = AbsMax()

    @property
    def bits(self) -> int:
        return self.format.bits

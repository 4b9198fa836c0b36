"""How one attention is computed: which tokens lie beside each other, which blocks of scores are left out, in how many bits.

Sequences are cut into blocks of queries and of keys, and everything is decided per block. The code is in ``dqtk/attention`` (what
calibration decides) and ``dqtk/kernels/block_attention.py`` (what is computed).
"""

from dataclasses import replace

from .formats import Int
from .frozen import frozen

# --- which of the orders of (frame, row, column) a head reads its tokens in ----------------------------------------------


@frozen
class Recall:
    """The order in which the blocks that are kept hold most of the attention: its sum over the largest blocks, as many as the mask
    keeps (a quarter of them without a mask)."""


@frozen
class Incoherence:
    """The order with the least mean of max / mean over blocks, which is the easiest to round (PAROAttention, arXiv 2506.16054)."""


@frozen
class WeightedSum:
    """PAROAttention's own formula (eq. 3): the least of alpha * sparsity + (1 - alpha) * incoherence, each divided by its sum over
    the orders. Its sparsity (share of blocks of which ``share`` is below ``small``) grows with what it should prefer, and enters
    with a plus; kept as published.
    """

    alpha: float = 0.5
    small: float = 1e-3
    share: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(
                f"WeightedSum: alpha must be from 0 to 1, got {self.alpha!r}. The paper does not say its own; try 0.5."
            )


Order = Recall | Incoherence | WeightedSum

# --- which blocks are computed -------------------------------------------------------------------------------------------


@frozen
class StaticBlocks:
    """The blocks with most attention in calibration, per head and interval of the noise level.

    density: share of all blocks, guards included (diagonal, text, a ragged end, one block per row). groups: intervals of the noise
    level with masks of their own. together: one budget for all heads, layers and intervals, spent where most attention is; else
    each keeps its share. edges: of the intervals, in the denoiser's time; found by calibration.
    """

    density: float
    groups: int = 4
    together: bool = True
    edges: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"StaticBlocks: density must be in (0, 1], got {self.density!r}. Half of the blocks is 0.5.")
        if not (isinstance(self.groups, int) and self.groups >= 1):
            raise ValueError(f"StaticBlocks: groups must be a positive integer, got {self.groups!r}. The usual number is 4.")


@frozen
class SlidingTile:
    """Blocks whose tokens lie near each other in the grid, the nearest ones up to a density (STA, arXiv 2502.04507, by blocks)."""

    density: float

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"SlidingTile: density must be in (0, 1], got {self.density!r}. Half of the blocks is 0.5.")


@frozen
class Radial:
    """Frames see less of each other the farther apart they are: half of the window per doubling of the distance (Radial Attention,
    arXiv 2506.19852), the widest window that keeps the density."""

    density: float

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"Radial: density must be in (0, 1], got {self.density!r}. Half of the blocks is 0.5.")


@frozen
class PooledBlocks:
    """Chosen in every call: per row of blocks those with the largest softmax of mean query times mean key (as SpargeAttn predicts,
    arXiv 2502.18137, without its test of similarity); samples of a batch share them."""

    density: float

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"PooledBlocks: density must be in (0, 1], got {self.density!r}. Half of the blocks is 0.5.")


Mask = StaticBlocks | SlidingTile | Radial | PooledBlocks

# --- rounding ------------------------------------------------------------------------------------------------------------


@frozen
class RowInTile:
    """A scale per row of a block of probabilities, codes without sign: both maxima are known to an online softmax anyway."""


@frozen
class PerTile:
    """One scale per block of probabilities, signed codes (PAROAttention)."""


@frozen
class Fixed:
    """Probabilities as multiples of 1 / 127 (or 1 / 7)."""


ProbabilityScale = RowInTile | PerTile | Fixed


@frozen
class SmoothKeys:
    """The mean key is taken from every key, which changes no probability (SageAttention, arXiv 2410.02367)."""


@frozen
class SmoothBoth:
    """Besides, each block's mean query is taken from its queries, its scores added in float (SageAttention2, arXiv 2411.10958)."""


@frozen
class Sage:
    """The installed package ``sageattention``: dense, queries and keys in INT8, the rest as it decides (arXiv 2411.10958)."""


@frozen
class AttentionSpec:
    """One attention.

    order: of the tokens, chosen per head (per layer if ``one_order``); None: as they lie. mask: None computes all blocks. block:
    queries and keys of a block. qk, pv: integers that queries and keys, probabilities and values are rounded to; None: not.
    kernel: of another package, which then decides everything; None: dqtk's own, else torch's.
    Found by calibration: layout: frames, rows, columns, text tokens before and after, of the sequence that it saw. orders: the one
    of every head, as an index into ``numerics.layout.ORDERS``.
    """

    order: Order | None = None
    one_order: bool = False
    mask: Mask | None = None
    block: tuple[int, ...] = (64, 64)
    qk: Int | None = None
    pv: Int | None = None
    scale: ProbabilityScale = RowInTile()
    smooth: SmoothKeys | SmoothBoth | None = None
    layout: tuple[int, ...] = ()
    orders: tuple[int, ...] = ()
    kernel: Sage | None = None

    def __post_init__(self) -> None:
        if len(self.block) != 2 or not all(isinstance(size, int) and size >= 8 and size % 8 == 0 for size in self.block):
            raise ValueError(f"AttentionSpec: block must be two multiples of 8, got {self.block!r}. The usual ones are 64 and 128.")
        for name, given in (("qk", self.qk), ("pv", self.pv)):
            if given is not None and (given.bits not in (4, 8) or not given.symmetric):
                raise ValueError(f"AttentionSpec: {name} must be symmetric integers of 4 or 8 bits or None, got {given!r}.")
        if self.layout and len(self.layout) != 5:
            raise ValueError(f"AttentionSpec: layout must be five numbers or none, got {self.layout!r}. Calibration finds it.")
        if not all(0 <= index < 6 for index in self.orders):
            raise ValueError(f"AttentionSpec: orders must be indices from 0 to 5, got {self.orders!r}. Calibration finds them.")
        if self.smooth is not None and self.qk is None:
            raise ValueError(f"AttentionSpec: smooth must be left out where queries and keys are not rounded, got {self.smooth!r}.")

        if self.kernel is not None and (rest := replace(self, kernel=None)) != AttentionSpec():
            raise ValueError(
                f"AttentionSpec: order, mask and rounding must be left out with {type(self.kernel).__name__}(), which decides "
                f"them, got {describe_attention(rest)}."
            )

    @property
    def needs_stats(self) -> bool:
        """Whether calibration decides something."""
        return self.order is not None or isinstance(self.mask, StaticBlocks)


def describe_attention(spec: AttentionSpec | None) -> str:
    """For tables: ``QK8 PV8 reordered, 0.30 of 64x64 blocks``."""
    if spec is None:
        return "16 bit"
    if spec.kernel is not None:
        return "QK8 dense, by sageattention"
    words = [f"{name}{given.bits}" for name, given in (("QK", spec.qk), ("PV", spec.pv)) if given is not None] or ["16 bit"]
    if spec.order is not None:
        words.append("reordered")
    text = " ".join(words)
    return text if spec.mask is None else f"{text}, {spec.mask.density:.2f} of {spec.block[0]}x{spec.block[1]} blocks"

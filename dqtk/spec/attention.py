"""How one attention is computed: which tokens lie beside each other, which blocks of scores are left out, in how many bits.

Sequences are cut into blocks of queries and of keys, and everything is decided per block. The code is in ``dqtk/attention`` (what
calibration decides) and ``dqtk/kernels/block_attention.py`` (what is computed).
"""

from dataclasses import replace

from .formats import Float, Int
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
class AttentionMass:
    """Blocks go where most attention is."""


@frozen
class OutputError:
    """Within a head blocks go where most attention is; between heads, layers and intervals where they lower the measured error of
    outputs most, relative to the layer's (``dqtk/attention/densities.py``).

    limit: a head whose error is below this share of its layer's mean head gets no more blocks, so fewer than the density may do.
    """

    limit: float | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and not self.limit > 0:
            raise ValueError(f"OutputError: limit must be positive or None, got {self.limit!r}. A twentieth is 0.05.")


@frozen
class StaticBlocks:
    """The blocks with most attention in calibration, per head and interval of the noise level.

    density: share of all blocks, guards included (diagonal, text, a ragged end, one block per row). groups: intervals of the noise
    level with masks of their own. together: one budget for all heads, layers and intervals, spent as ``by`` says; else
    each keeps its share. by: what a budget is spent by.
    Found by calibration: edges: of the intervals, in the denoiser's time. computed: share of the blocks of all heads and intervals
    of this attention that came out, which is another where there is one budget for all, or guards alone are more.
    """

    density: float
    groups: int = 4
    together: bool = True
    by: AttentionMass | OutputError = AttentionMass()
    edges: tuple[float, ...] = ()
    computed: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"StaticBlocks: density must be in (0, 1], got {self.density!r}. Half of the blocks is 0.5.")
        if not (isinstance(self.groups, int) and self.groups >= 1):
            raise ValueError(f"StaticBlocks: groups must be a positive integer, got {self.groups!r}. The usual number is 4.")
        if self.computed is not None and not 0 < self.computed <= 1:
            raise ValueError(f"StaticBlocks: computed must be in (0, 1] or None, got {self.computed!r}. Calibration finds it.")


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


@frozen
class SkipSoftmax:
    """Chosen in every call: a block is left out where for each of its queries its largest probability is below a share of the
    largest of the row (the threshold that kernels skip a softmax by). Looking costs all products of queries and keys, so without
    such a kernel it saves nothing: it is here to compare with, and says what a threshold costs in pictures."""

    threshold: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"SkipSoftmax: threshold must be in (0, 1), got {self.threshold!r}. A thousandth is 1e-3.")


Mask = StaticBlocks | SlidingTile | Radial | PooledBlocks | SkipSoftmax

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
class Adaptive:
    """Widths by measured error (after SageAttention2's report and SageAttention, section 4.5): per head, or per layer unless
    ``per_head``, the narrowest codes with which outputs on calibration differ from those of numbers that are not rounded by at most
    ``error``, relative in L2; not rounded where none do. 4 and 8 bits are tried, apart for queries and keys and for probabilities
    and values, up to the width of the spec."""

    error: float = 0.05
    per_head: bool = True

    def __post_init__(self) -> None:
        if not self.error > 0:
            raise ValueError(f"Adaptive: error must be positive, got {self.error!r}. A twentieth is 0.05.")


@frozen
class Sage:
    """The installed package ``sageattention``: dense, queries and keys in INT8, the rest as it decides (arXiv 2411.10958)."""


@frozen
class AttentionSpec:
    """One attention.

    order: of the tokens, chosen per head (per layer if ``one_order``); None: as they lie. mask: None computes all blocks. block:
    queries and keys of a block.
    qk, pv: what queries and keys, probabilities and values are rounded to: integers, ``pv`` also E4M3; None: not rounded.
    adapt: how widths are chosen below those of ``qk`` and ``pv``; None: they are these.
    kernel: of another package, which then decides everything; None: dqtk's own, else torch's.
    Found by calibration: layout: frames, rows, columns, text tokens before and after, of the sequence that it saw. orders: the one
    of every head, as an index into ``numerics.layout.ORDERS``. qk_bits, pv_bits: chosen widths of every head, 16: not rounded.
    """

    order: Order | None = None
    one_order: bool = False
    mask: Mask | None = None
    block: tuple[int, ...] = (64, 64)
    qk: Int | None = None
    pv: Int | Float | None = None
    scale: ProbabilityScale = RowInTile()
    smooth: SmoothKeys | SmoothBoth | None = None
    layout: tuple[int, ...] = ()
    orders: tuple[int, ...] = ()
    adapt: Adaptive | None = None
    qk_bits: tuple[int, ...] = ()
    pv_bits: tuple[int, ...] = ()
    kernel: Sage | None = None

    def __post_init__(self) -> None:
        if len(self.block) != 2 or not all(isinstance(size, int) and size >= 8 and size % 8 == 0 for size in self.block):
            raise ValueError(f"AttentionSpec: block must be two multiples of 8, got {self.block!r}. The usual ones are 64 and 128.")
        for name, given in (("qk", self.qk), ("pv", self.pv)):
            if isinstance(given, Int) and (given.bits not in (4, 8) or not given.symmetric):
                raise ValueError(f"AttentionSpec: {name} must be symmetric integers of 4 or 8 bits or None, got {given!r}.")
        if isinstance(self.pv, Float) and (self.pv != Float() or self.scale != RowInTile() or self.adapt is not None):
            raise ValueError(
                f"AttentionSpec: pv must be E4M3 with a scale per row of a block and without adapt where it is a Float, "
                f"got {self.pv!r}, {self.scale!r} and {self.adapt!r}. Write Float()."
            )
        if self.layout and len(self.layout) != 5:
            raise ValueError(f"AttentionSpec: layout must be five numbers or none, got {self.layout!r}. Calibration finds it.")
        if not all(0 <= index < 6 for index in self.orders):
            raise ValueError(f"AttentionSpec: orders must be indices from 0 to 5, got {self.orders!r}. Calibration finds them.")
        if self.smooth is not None and self.qk is None:
            raise ValueError(f"AttentionSpec: smooth must be left out where queries and keys are not rounded, got {self.smooth!r}.")

        if self.adapt is not None and self.qk is None and self.pv is None:
            raise ValueError("AttentionSpec: qk or pv must be given with adapt, got neither. They are the widest that is tried.")
        if len(self.qk_bits) != len(self.pv_bits) or not {*self.qk_bits, *self.pv_bits} <= {4, 8, 16}:
            raise ValueError(
                f"AttentionSpec: qk_bits and pv_bits must be 4, 8 or 16 for the same heads, got {self.qk_bits} and {self.pv_bits}. "
                "Calibration finds them."
            )
        if self.kernel is not None and (rest := replace(self, kernel=None)) != AttentionSpec():
            raise ValueError(
                f"AttentionSpec: order, mask and rounding must be left out with {type(self.kernel).__name__}(), which decides "
                f"them, got {describe_attention(rest)}."
            )

    @property
    def needs_stats(self) -> bool:
        """Whether calibration decides something."""
        return self.order is not None or isinstance(self.mask, StaticBlocks) or self.adapt is not None

    def widths(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """Bits of queries and keys, and of probabilities and values -> the heads that have them; () stands for all."""
        if not self.qk_bits:
            return {(self.qk.bits if self.qk else 16, self.pv.bits if self.pv else 16): ()}
        found: dict[tuple[int, int], tuple[int, ...]] = {}
        for head, bits in enumerate(zip(self.qk_bits, self.pv_bits, strict=True)):
            found[bits] = (*found.get(bits, ()), head)
        return found if len(found) > 1 else dict.fromkeys(found, ())


def describe_attention(spec: AttentionSpec | None) -> str:
    """For tables: ``QK8 PV8 reordered, 0.30 of 64x64 blocks``; three digits where it is what calibration found."""
    if spec is None:
        return "16 bit"
    if spec.kernel is not None:
        return "QK8 dense, by sageattention"
    words = _described_widths(spec)
    if spec.order is not None:
        words.append("reordered")
    text = " ".join(words)
    size = f"{spec.block[0]}x{spec.block[1]}"
    if isinstance(spec.mask, SkipSoftmax):
        return f"{text}, {size} blocks above {spec.mask.threshold:g} of the largest"
    if spec.mask is None:
        return text
    computed = getattr(spec.mask, "computed", None)
    return f"{text}, {f'{spec.mask.density:.2f}' if computed is None else f'{computed:.3f}'} of {size} blocks"


def _described_widths(spec: AttentionSpec) -> list[str]:
    """``QK4/8 PV8`` where heads differ; ``QK8 PV8 or less`` before calibration."""
    pairs = spec.widths()
    words = []
    for name, widths in (("QK", {qk for qk, _ in pairs}), ("PV", {pv for _, pv in pairs})):
        if name == "PV" and isinstance(spec.pv, Float):
            words.append("PV in FP8")
        elif widths != {16}:
            words.append(name + "/".join(map(str, sorted(widths))))
    less = ["or less"] if spec.adapt is not None and not spec.qk_bits else []
    return [*words, *less] or ["16 bit"]

"""What happens to one linear or convolution: weight, input, change of basis, low-rank branch, and how its codes are chosen.

The order is fixed: transforms in the order given, then the low-rank branch, then the solver on what is left, then the bias.
"""

from dataclasses import replace
from itertools import pairwise

from .formats import (
    GROUPS,
    MSE,
    STATIC,
    VECTORS,
    AbsMax,
    BestFloat,
    Codebook,
    Dynamic,
    E4M3Group,
    E8M0Group,
    Float,
    Int,
    PerChannel,
    PerGroup,
    PerLevel,
    PerTensor,
    PerToken,
    TensorSpec,
    TwoLevel,
    VectorCodebook,
)
from .frozen import frozen
from .trellis import Trellis

# --- solvers: how codes are chosen. The code is in dqtk/methods, one file each ---------------------------------------


@frozen
class RTN:
    """Round to nearest, after the range has been found."""


@frozen
class GPTQ:
    """Round column by column and let the columns that follow make up for it (Frantar et al. 2022, arXiv 2210.17323).

    damping: share of the mean of the Gram matrix's diagonal that is added to it. act_order: columns of large inputs first. sweeps:
    rounds of coordinate descent afterwards (CDQuant, Nair & Suggala 2024, arXiv 2406.17542); 0 is plain GPTQ.
    """

    damping: float = 0.01
    act_order: bool = True
    sweeps: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(f"GPTQ: damping must be in (0, 1], got {self.damping!r}. The usual value is 0.01.")
        if not (isinstance(self.sweeps, int) and self.sweeps >= 0):
            raise ValueError(f"GPTQ: sweeps must be 0 or a positive integer, got {self.sweeps!r}. The usual number is 2.")


@frozen
class AdaRound:
    """Learn for every weight whether it is rounded up or down (Nagel et al. 2020, arXiv 2004.10568), on any grid.

    On floating-point grids the step differs from weight to weight; the variable is scaled so that its gradient does not (FP4DiT,
    arXiv 2503.15465). iterations: Adam steps. sweeps: rounds of coordinate descent afterwards, as of ``GPTQ``.
    """

    iterations: int = 2500
    sweeps: int = 2

    def __post_init__(self) -> None:
        if not (isinstance(self.iterations, int) and self.iterations >= 1):
            raise ValueError(f"AdaRound: iterations must be a positive integer, got {self.iterations!r}. The usual number is 2500.")
        if not (isinstance(self.sweeps, int) and self.sweeps >= 0):
            raise ValueError(f"AdaRound: sweeps must be 0 or a positive integer, got {self.sweeps!r}. The usual number is 2.")


@frozen
class BeamSearch:
    """Words and books in turn, until a round lowers the output error by less than ``tolerance`` (VQDM, arXiv 2409.00492).

    Words by a beam search of ``beam`` sums within each vector, all others fixed; books and scales by least squares. For
    ``VectorCodebook`` only. rounds: at most. damping: as of ``GPTQ``.
    """

    beam: int = 8
    tolerance: float = 0.01
    rounds: int = 20
    damping: float = 0.01

    def __post_init__(self) -> None:
        for name in ("beam", "rounds"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"BeamSearch: {name} must be a positive integer, got {value!r}. Use BeamSearch().")
        if not 0 < self.tolerance < 1 or not 0 < self.damping <= 1:
            raise ValueError(
                f"BeamSearch: tolerance must be in (0, 1) and damping in (0, 1], got {self.tolerance!r} and {self.damping!r}. "
                "Use BeamSearch()."
            )


Solver = RTN | GPTQ | AdaRound | BeamSearch

# --- transforms: changes of basis of the input that keep the function -------------------------------------------------


@frozen
class Smooth:
    """Divide input channel j by s_j and multiply its weights: s_j = max|X_j|^alpha / max|W_j|^(1 - alpha).

    SmoothQuant's convention (Xiao et al. 2022, arXiv 2211.10438, eq. 4). ``alpha`` None: searched on the layer's output error, no
    smoothing among the candidates. power_of_two: s_j rounded to 1, 2, 4 or 8 relative to the least, which a floating-point weight
    takes into its exponent without loss (LLM-FP4's pre-shifted exponents, arXiv 2310.16836).
    """

    alpha: float | None = None
    power_of_two: bool = False

    def __post_init__(self) -> None:
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"Smooth: alpha must be from 0 to 1 or None, got {self.alpha!r}. None searches it.")


@frozen
class Hadamard:
    """Rotate the input by random signs and a Hadamard matrix, in blocks; the weight by the same.

    block: largest block; None: the whole width where a matrix of that order is known, else the largest block that divides it.
    regular: rows of equal sum, in blocks of a power of four (ConvRot, arXiv 2512.03673). seed: of the signs, which are stored.
    """

    block: int | None = None
    regular: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.block is not None and not (isinstance(self.block, int) and self.block >= 4):
            raise ValueError(f"Hadamard: block must be an integer of at least 4 or None, got {self.block!r}. Usual: 64 to 256.")


@frozen
class ShortcutSplit:
    """Scales of its own for every part of an input that is a concatenation; weights and inputs (MixDQ, arXiv 2405.17873, sec. 4.1).

    at: input channels where parts begin, ascending. Empty: found by watching calibration calls; a layer whose input is no
    concatenation stays whole.
    """

    at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        bounds = (0, *self.at)
        if any(a >= b for a, b in pairwise(bounds)):
            raise ValueError(f"ShortcutSplit: at must be ascending channels above 0, got {self.at}. Empty: they are found.")


@frozen
class ConstantToken:
    """Keep a token that is the same for every prompt, such as CLIP's first, out of rounding (MixDQ, arXiv 2405.17873, section 4.1).

    The layer stores the token and what the exact weight makes of it; only what differs from it is rounded. Looked for at the first
    place of a linear's input in calibration calls; a layer where it differs from prompt to prompt does without.
    """


Transform = Smooth | Hadamard | ShortcutSplit | ConstantToken
FIRST = (ConstantToken, ShortcutSplit)
"""Kinds of transforms that come before others, in this order."""


@frozen
class LowRank:
    """A branch of ``rank`` in 16 bits beside the quantized weight: W ~ up @ down + Q(W - up @ down) (SVDQuant, arXiv 2411.05007).

    iterations: alternations between branch and rounded rest; the best is kept. shared: sites that share an input share ``down``, so
    that a kernel may compute it once for all of them. Every layer stores its own copy, so at equal bytes it only costs quality.
    """

    rank: int = 32
    iterations: int = 10
    shared: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "iterations"):
            value = getattr(self, name)
            if not (isinstance(value, int) and value >= 1):
                raise ValueError(f"LowRank: {name} must be a positive integer, got {value!r}. No branch is low_rank=None.")


# --- the layer -------------------------------------------------------------------------------------------------------


@frozen
class LayerSpec:
    """What happens to one linear or convolution. ``input`` None: kept in the compute dtype.

    correct_bias: shift the bias by the mean output error on the calibration inputs (Nagel et al. 2019, arXiv 1906.04721).
    """

    weight: TensorSpec
    input: TensorSpec | None = None
    solver: Solver = RTN()
    transforms: tuple[Transform, ...] = ()
    low_rank: LowRank | None = None
    correct_bias: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.transforms, tuple):
            raise ValueError(f"LayerSpec: transforms must be a tuple, got {self.transforms!r}. For example (Smooth(), Hadamard()).")
        self._check_weight()
        if self.input is not None:
            self._check_input(self.input)
        if isinstance(self.weight.format, VECTORS):
            self._check_vectors()
        elif isinstance(self.solver, BeamSearch):
            raise ValueError(
                f"LayerSpec: solver must be RTN, GPTQ or AdaRound for {type(self.weight.format).__name__}, got {self.solver}. "
                "BeamSearch is for VectorCodebook."
            )
        if isinstance(self.solver, AdaRound) and isinstance(self.weight.format, Codebook):
            raise ValueError(
                f"LayerSpec: solver must be RTN or GPTQ for a Codebook, got {self.solver}. Its values have no up and down."
            )
        kinds = [type(transform) for transform in self.transforms]
        if len(set(kinds)) != len(kinds):
            raise ValueError(f"LayerSpec: transforms must be of different kinds, got {self.transforms}. Drop one.")
        first = [kind for kind in FIRST if kind in kinds]
        if kinds[: len(first)] != first:
            raise ValueError(
                f"LayerSpec: transforms must begin with {' and '.join(kind.__name__ for kind in first)}, got {self.transforms}. "
                "The others act on what these leave."
            )

    def _check_weight(self) -> None:
        form, granularity = self.weight.format, self.weight.granularity
        if isinstance(granularity, PerToken | PerLevel) or isinstance(self.weight.range, Dynamic):
            raise ValueError(
                "LayerSpec: weight must be static with PerTensor, PerChannel or a group granularity, "
                f"got {granularity} with {self.weight.range}. Weights have no tokens."
            )
        if isinstance(granularity, TwoLevel) and not (isinstance(form, Int) and form.symmetric and form.bits <= 7):
            raise ValueError(
                f"LayerSpec: weight with TwoLevel granularity must be symmetric Int of at most 7 bits, got {form}. Use PerGroup."
            )
        if isinstance(form, Float | BestFloat) and not form.signed:
            raise ValueError(f"LayerSpec: weight must be a signed format, got {form}. Unsigned floats are for inputs.")
        if isinstance(form, Codebook) and not all(table[0] < 0 for table in form.tables):
            raise ValueError(f"LayerSpec: weight must be a signed format, got {form.name or form} from 0 up. It is for inputs.")
        _check_format("weight", self.weight)

    def _check_vectors(self) -> None:
        """What a weight of vectors asks of the rest."""
        spec, form = self.weight, type(self.weight.format).__name__
        allowed = (PerChannel,) if isinstance(spec.format, Trellis) else (PerTensor, PerChannel)
        if not isinstance(spec.granularity, allowed) or spec.range != AbsMax():
            raise ValueError(
                f"LayerSpec: weight of {form} must be {' or '.join(kind.__name__ for kind in allowed)} without a range, got "
                f"{spec.granularity} with {spec.range}. Its scale is the root mean square."
            )
        solvers = (RTN, GPTQ, BeamSearch) if isinstance(spec.format, VectorCodebook) else (RTN, GPTQ)
        if not isinstance(self.solver, solvers):
            names = " or ".join(kind.__name__ for kind in solvers)
            raise ValueError(f"LayerSpec: solver must be {names} for {form}, got {self.solver}. Its values have no up and down.")
        if self.low_rank is not None:
            raise ValueError(f"LayerSpec: low_rank must be None for {form}, got {self.low_rank}. Take more bits.")
        shared = isinstance(spec.format, VectorCodebook) and spec.format.group is not None
        if shared and (other := next((each for each in self.transforms if not isinstance(each, Hadamard)), None)):
            raise ValueError(
                f"LayerSpec: transforms must be Hadamard or none where layers share books, got {other}. Others are known only when "
                "a layer is solved, books before any is. Leave it out, or group=None."
            )
        if any(isinstance(transform, Smooth) and transform.alpha is None for transform in self.transforms):
            raise ValueError(f"LayerSpec: Smooth must have an alpha for {form}, got None. Each try would learn a codebook.")

    def _check_input(self, spec: TensorSpec) -> None:
        if isinstance(spec.format, VECTORS):
            raise ValueError(
                f"LayerSpec: input must be Int, Float or Codebook, got {spec.format}. Words are learned, and for weights."
            )
        if isinstance(spec.granularity, PerChannel | TwoLevel):
            raise ValueError(
                f"LayerSpec: input granularity must be PerToken, PerTensor, PerLevel or a group of inputs, got {spec.granularity}. "
                "Matmuls need scales that do not depend on the channel."
            )
        if isinstance(spec.range, Dynamic) == isinstance(spec.granularity, STATIC):
            raise ValueError(
                "LayerSpec: input must be PerTensor or PerLevel with a calibrated range, PerToken or in groups with Dynamic "
                f"range, got {spec.granularity} with {spec.range}. A token's range is known only when it arrives."
            )
        if isinstance(spec.format, BestFloat) and isinstance(spec.range, Dynamic):
            raise ValueError(
                f"LayerSpec: input format under a Dynamic range must be a fixed one, got {spec.format}. "
                "Use Float(exponent=4, mantissa=3)."
            )
        _check_format("input", spec)

    @property
    def needs_ranges(self) -> bool:
        """Whether calibration must find the range of this layer's input."""
        return self.input is not None and not isinstance(self.input.range, Dynamic)

    @property
    def searches_input(self) -> bool:
        """Whether a static input's format or range is searched, and not read off its least and largest value."""
        if self.input is None or not self.needs_ranges:
            return False
        form = self.input.format
        several = isinstance(form, BestFloat) or (isinstance(form, Codebook) and len(form.tables) > 1)
        return several or isinstance(self.input.range, MSE)

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration must keep what this layer learns from: a sample of its inputs, and perhaps their second moments."""
        smooth = any(isinstance(transform, Smooth) for transform in self.transforms)
        moved = self.needs_ranges and bool(self.transforms)  # the range of a transformed input is not that of the input
        return self.needs_moments or smooth or self.looks or moved or self.correct_bias or self.searches_input

    @property
    def looks(self) -> bool:
        """Whether calls must be watched for what the weights do not tell: a constant token, where an input is concatenated."""
        return ConstantToken() in self.transforms or ShortcutSplit() in self.transforms

    @property
    def needs_moments(self) -> bool:
        """Whether solver or branch learn from the second moments of the input."""
        return self.solver != RTN() or self.low_rank is not None

    @property
    def needs_stats(self) -> bool:
        """Whether calibration must see this layer's input first."""
        return self.needs_ranges or self.needs_inputs

    def __str__(self) -> str:
        return describe(self)


def without(spec: LayerSpec, *kinds: type[Transform]) -> LayerSpec:
    """The spec without transforms of these kinds."""
    return replace(spec, transforms=tuple(transform for transform in spec.transforms if not isinstance(transform, kinds)))


def _check_format(where: str, spec: TensorSpec) -> None:
    """What a format and a granularity ask of each other."""
    form, granularity = spec.format, spec.granularity
    two_sided = getattr(form, "symmetric", getattr(form, "signed", False))
    if isinstance(granularity, E8M0Group | E4M3Group) and not two_sided:
        raise ValueError(
            f"LayerSpec: {where} with {type(granularity).__name__} must be a signed Float or a symmetric Int, got {form}. "
            "Use PerGroup."
        )
    if not (isinstance(form, Codebook) and len(form.tables) > 1):
        return
    if where == "weight" and not isinstance(granularity, PerGroup):
        raise ValueError(
            f"LayerSpec: {where} with several tables must be PerGroup, got {granularity}. Every group chooses one of them."
        )
    if where == "input" and isinstance(spec.range, Dynamic):
        raise ValueError(
            "LayerSpec: input with a Dynamic range must have one table, got several. Choosing at every call does not pay."
        )


# --- words -----------------------------------------------------------------------------------------------------------


def describe(spec: LayerSpec | None) -> str:
    """A short name such as ``W4 group 64 two-level, A8 per token``; solver, transforms and branch where there are any."""
    if spec is None:
        return "16 bit"
    parts = [f"W{_short(spec.weight)}", f"A{_short(spec.input)}" if spec.input else "A16"]
    parts += [_name(transform) for transform in spec.transforms]
    if spec.low_rank is not None:
        parts.append(f"rank {spec.low_rank.rank}")
    if spec.solver != RTN():
        parts.append(type(spec.solver).__name__)
    if spec.correct_bias:
        parts.append("bias")
    return ", ".join(parts)


def _name(transform: Transform) -> str:
    if isinstance(transform, Smooth):
        return "shift" if transform.power_of_two else "smooth" + ("" if transform.alpha is None else f" {transform.alpha:g}")
    if isinstance(transform, ShortcutSplit):
        return "split" + "".join(f" {channel}" for channel in transform.at)
    if isinstance(transform, ConstantToken):
        return "constant token"
    return "rotated" + ("" if transform.block is None else f" {transform.block}") + (" regular" if transform.regular else "")


def _short(tensor: TensorSpec) -> str:
    form = tensor.format
    words: dict[type, str] = {
        PerTensor: "per tensor",
        PerLevel: "per noise level",
        PerChannel: "per channel",
        PerToken: "per token",
    }
    kinds: dict[type, str] = {PerGroup: "", TwoLevel: " two-level", E8M0Group: " E8M0", E4M3Group: " E4M3"}
    granularity = tensor.granularity
    if isinstance(granularity, PerLevel) and granularity.edges:
        words[PerLevel] = f"per noise level ({granularity.count} intervals)"
    where = f"group {granularity.size}{kinds[type(granularity)]}" if isinstance(granularity, GROUPS) else words[type(granularity)]
    if isinstance(form, Float):
        return f"FP{form.bits} {'' if form.signed else 'U'}E{form.exponent}M{form.mantissa} {where}"
    if isinstance(form, BestFloat):
        return f"FP{form.bits} {where}"
    if isinstance(form, Codebook):
        return f"{form.bits} {form.name or 'codebook'} {where}"
    if isinstance(form, Trellis):
        return f"{form.bits} trellis of {form.state_bits} {where}"
    if isinstance(form, VectorCodebook):
        shared = "" if form.group is None else f" shared by {form.group}"
        return f"{form.bits} {'' if form.books == 1 else f'{form.books} x '}{form.words} words of {form.length}{shared} {where}"
    return f"{form.bits} {where}" + ("" if form.symmetric else " asym")

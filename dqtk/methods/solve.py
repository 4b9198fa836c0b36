"""Sites that share an input -> the tensors of their layers. The one place that picks solvers and transforms, by the type of the
choice.

The order is fixed: constant token, parts of the input, transforms as the spec lists them, format search, low-rank branch, solver
on what is left, bias. Transforms act on the weights and on the statistics of the input, so one calibration serves them all.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dqtk.calibrate.gather import Inputs
from dqtk.nn.basis import block_of
from dqtk.numerics.affine import scale_of_range
from dqtk.numerics.hadamard import pack_signs, random_signs, rotate
from dqtk.numerics.inputs import round_input
from dqtk.numerics.packing import Packed, dequantize
from dqtk.numerics.storage import parts_of, stored_name
from dqtk.numerics.vector_grid import width_of
from dqtk.numerics.weight_grid import fit_grid
from dqtk.spec import (
    GPTQ,
    RTN,
    STATIC,
    VECTORS,
    AdaRound,
    BeamSearch,
    ConstantToken,
    Float,
    Hadamard,
    Int,
    LayerSpec,
    PerLevel,
    PerToken,
    SiteSpec,
    Smooth,
    TensorSpec,
    Transform,
    each_of,
    shared_forms,
)

from .adaround import adaround
from .beam_search import beam_search
from .constant_token import token_tensors
from .format_search import concrete
from .gptq import Factor, gptq
from .level_tables import intervals_of, tables
from .low_rank import low_rank
from .rtn import rtn
from .shortcut_split import columns_of, inputs_of
from .smooth import smoothing
from .vectors import nearest_vectors, swept_vectors

SEARCH_ROWS = 512  # of a weight, evenly: on them smoothing is searched
FINAL_ROWS = 64  # on them it is judged once more, behind a solver that learns


@dataclass(frozen=True, kw_only=True, slots=True)
class Solution:
    """What one layer becomes: its spec with every search answered, the tensors it stores, and what its bias gains (float32 [N])."""

    spec: SiteSpec
    tensors: dict[str, Tensor]
    bias_shift: Tensor | None = None


def solve(
    weights: Sequence[Tensor],
    spec: LayerSpec,
    inputs: Inputs | None = None,
    *,
    channels: int | None = None,
    input_range: tuple[Tensor, Tensor] | None = None,
    token: Tensor | None = None,
    books: Mapping[str, Tensor] | None = None,
) -> list[Solution]:
    """Quantize the weights of layers that share an input and a spec.

    Args:
        weights: float [N_i, K] each.
        spec: of every one of them.
        inputs: statistics of the input; needed if ``spec.needs_inputs``.
        channels: input channels, where K counts the taps of a convolution too.
        input_range: least and largest input [L], [L], of every interval of the noise level where the spec tells them apart; needed
            if ``spec.needs_ranges`` and ``inputs`` are not given.
        token: [K], which the spec keeps out of rounding; ``inputs`` are without it.
        books: shared books (``shared_books.py``) by group.
    Returns:
        One solution per weight.
    Raises:
        ValueError: the words are in shared books, and none of that group are given.
    """
    assert inputs is not None or not spec.needs_inputs
    channels = weights[0].shape[1] if channels is None else channels
    if token is not None:
        return _solve_without_token(weights, spec, inputs, token)
    if parts_of(spec, channels):
        return _solve_parts(weights, spec, inputs, channels)
    device = weights[0].device
    inputs = None if inputs is None else inputs.to(device)
    input_range = None if input_range is None else (input_range[0].to(device), input_range[1].to(device))
    work = [weight.float() for weight in weights] if spec.needs_inputs or spec.transforms else list(weights)
    shared: dict[str, Tensor] = {}
    for index, transform in enumerate(spec.transforms):
        work, inputs, found = _transformed(work, inputs, transform, spec, index, channels)
        shared |= found
    weight_spec = concrete(work[0] if len(work) == 1 else torch.cat(work), spec.weight)
    spec = replace(spec, weight=weight_spec)
    spec, given = _static_input(spec, inputs, input_range)
    shared |= given
    branches: list[tuple[Tensor, Tensor]] = []
    if spec.low_rank is not None:
        assert inputs is not None
        branches = _branches(work, spec, inputs, _input_noise(inputs, spec, shared))
        work = [w - up.float() @ down.float() for w, (down, up) in zip(work, branches, strict=True)]
    factor = None
    if inputs is not None and isinstance(spec.solver, GPTQ | BeamSearch):
        factor = Factor.of(inputs.gram, spec.solver, width_of(spec.weight))
    codebook = _shared_book(spec, books or {})
    solutions = []
    for index, weight in enumerate(work):
        packed = _packed(weight, spec, inputs, factor, codebook)
        # Copies: files have no tensors that share memory.
        tensors = packed.tensors() | {name: tensor.clone() for name, tensor in shared.items()}
        if codebook is not None:
            del tensors["codebook"]
        if branches:
            down, up = branches[index]
            tensors |= {"down": down.clone(), "up": up.clone()}
        shift = None
        if spec.correct_bias:
            assert inputs is not None
            shift = _bias_shift(weight, packed, spec, inputs, shared)
        solutions.append(Solution(spec=spec, tensors=tensors, bias_shift=shift))
    return solutions


def _solve_without_token(weights: Sequence[Tensor], spec: LayerSpec, inputs: Inputs | None, token: Tensor) -> list[Solution]:
    """The rest of the spec, and what every layer stores of the token."""
    first, *others = spec.transforms
    assert first == ConstantToken()
    solved = solve(weights, replace(spec, transforms=tuple(others)), inputs)
    return [
        replace(
            found,
            spec=each_of(found.spec, lambda rest: replace(rest, transforms=(first, *rest.transforms))),
            tensors=found.tensors | token_tensors(weight, token),
        )
        for weight, found in zip(weights, solved, strict=True)
    ]


def _solve_parts(weights: Sequence[Tensor], spec: LayerSpec, inputs: Inputs | None, channels: int) -> list[Solution]:
    """Every part of the input by itself, in formats that are found for the whole."""
    spec = replace(spec, weight=concrete(weights[0] if len(weights) == 1 else torch.cat(list(weights)), spec.weight))
    if spec.searches_input:
        assert spec.input is not None
        assert inputs is not None
        spec = replace(spec, input=tables(inputs.sample, inputs.times, spec.input, inputs)[0])
    merged: list[dict[str, Tensor]] = [{} for _ in weights]
    shifts: list[Tensor | None] = [None for _ in weights]
    for part in parts_of(spec, channels):
        columns = columns_of(part, weights[0].shape[1], channels).to(weights[0].device)
        own = None if inputs is None else inputs_of(part, inputs, channels)
        solved = solve([weight[:, columns] for weight in weights], part.spec, own, channels=part.stop - part.start)
        for index, found in enumerate(solved):
            merged[index] |= {stored_name(name, part.place): tensor for name, tensor in found.tensors.items()}
            before = shifts[index]
            shifts[index] = found.bias_shift if before is None or found.bias_shift is None else before + found.bias_shift
    return [Solution(spec=spec, tensors=tensors, bias_shift=shift) for tensors, shift in zip(merged, shifts, strict=True)]


def _branches(weights: list[Tensor], spec: LayerSpec, inputs: Inputs, noise: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """down and up of every weight."""
    assert spec.low_rank is not None
    if not spec.low_rank.shared:
        return [low_rank(weight, spec.weight, inputs, spec.low_rank, noise) for weight in weights]
    down, up = low_rank(torch.cat(weights), spec.weight, inputs, spec.low_rank, noise)
    return [(down, mine) for mine in up.split([weight.shape[0] for weight in weights])]


def _shared_book(spec: LayerSpec, books: Mapping[str, Tensor]) -> Tensor | None:
    forms = shared_forms(spec)
    if not forms:
        return None
    (form,) = forms
    assert form.group is not None
    if form.group not in books:
        raise ValueError(
            f"solve: books of group {form.group!r} must be learned before the layers that share them, got books of "
            f"{sorted(books) or 'no group'}. They are learned by dqtk.quantize; leave group out elsewhere."
        )
    return books[form.group]


def _packed(
    weight: Tensor, spec: LayerSpec, inputs: Inputs | None, factor: Factor | None, codebook: Tensor | None = None
) -> Packed:
    solver = spec.solver
    if isinstance(spec.weight.format, VECTORS):
        return _packed_vectors(weight, spec, inputs, factor, codebook)
    if isinstance(solver, RTN):
        return rtn(weight, spec.weight)
    assert inputs is not None
    if isinstance(solver, GPTQ):
        return gptq(weight, spec.weight, inputs, solver, factor)
    assert isinstance(solver, AdaRound)
    return adaround(weight, spec.weight, inputs, solver)


def _packed_vectors(
    weight: Tensor, spec: LayerSpec, inputs: Inputs | None, factor: Factor | None, codebook: Tensor | None
) -> Packed:
    solver = spec.solver
    if isinstance(solver, RTN):
        return nearest_vectors(weight, spec.weight, codebook)
    assert inputs is not None
    if isinstance(solver, GPTQ):
        return swept_vectors(weight, spec.weight, inputs, solver, factor, codebook)
    assert isinstance(solver, BeamSearch)
    return beam_search(weight, spec.weight, inputs, solver, factor, codebook)


# --- transforms ------------------------------------------------------------------------------------------------------


def _transformed(
    weights: list[Tensor], inputs: Inputs | None, transform: Transform, spec: LayerSpec, index: int, channels: int
) -> tuple[list[Tensor], Inputs | None, dict[str, Tensor]]:
    """Weights and statistics in the new basis, and the tensors that layers need to go there."""
    if isinstance(transform, Hadamard):
        turned = rotation(transform, channels)
        rotated = None if inputs is None else inputs.mapped(turned)
        signs = pack_signs(random_signs(channels, transform.seed)).to(weights[0].device)
        return [turned(weight) for weight in weights], rotated, {"signs": signs}
    assert isinstance(transform, Smooth)
    assert inputs is not None
    rest = replace(spec, transforms=spec.transforms[index + 1 :])
    judged = _some_rows(weights, SEARCH_ROWS)
    multiplier = smoothing(weights, inputs, transform, channels, lambda m: _smooth_error(judged, inputs, rest, m, channels))
    none = torch.ones_like(multiplier)
    if transform.alpha is None and not isinstance(spec.solver, RTN) and not torch.equal(multiplier, none):
        few = _some_rows(weights, FINAL_ROWS)
        smoothed, plain = (_solved_error(few, inputs, rest, m, channels) for m in (multiplier, none))
        multiplier = multiplier if smoothed <= plain else none
    taps = multiplier.repeat(weights[0].shape[1] // channels)
    return [weight / taps for weight in weights], inputs.scaled(taps), {"smooth": multiplier.bfloat16()}


def rotation(transform: Hadamard, channels: int) -> Callable[[Tensor], Tensor]:
    """The rotation of rows [..., taps * channels], each tap alike."""
    signs, block = random_signs(channels, transform.seed), block_of(transform, channels)
    return lambda x: rotate(x.unflatten(-1, (-1, channels)), signs.to(x.device), block, transform.regular).flatten(-2)


def _smooth_error(weights: list[Tensor], inputs: Inputs, rest: LayerSpec, multiplier: Tensor, channels: int) -> float:
    """Output error on the sample with this smoothing: weights and inputs rounded to nearest, later rotations included."""
    taps = multiplier.repeat(weights[0].shape[1] // channels)
    x, scaled = inputs.sample * taps, [weight / taps for weight in weights]
    ends = None if inputs.ends is None else inputs.ends * multiplier.repeat(2)
    for transform in rest.transforms:
        if isinstance(transform, Hadamard):
            turned = rotation(transform, channels)
            x, scaled, ends = turned(x), [turned(weight) for weight in scaled], None
    q = x if rest.input is None else _round_sample(x, ends, inputs.times, rest.input)
    total = 0.0
    for weight, moved in zip(weights, scaled, strict=True):
        form = concrete(moved, rest.weight)
        total += float((q @ fit_grid(moved, form).round(moved).T - inputs.sample @ weight.T).square().sum())
    return total


def _some_rows(weights: list[Tensor], most: int) -> list[Tensor]:
    """Rows of every weight, evenly."""
    return [weight[:: -(-weight.shape[0] // most)] for weight in weights]


def _solved_error(weights: list[Tensor], inputs: Inputs, rest: LayerSpec, multiplier: Tensor, channels: int) -> float:
    """The same with weights as GPTQ leaves them, whatever learns.

    Rounding to nearest does not tell: where one token is huge, its error hides what smoothing does to the others, and what it does
    to the token itself (equal channels that cancel round alike, unequal ones do not) shows once the weights are learned.
    """
    taps = multiplier.repeat(weights[0].shape[1] // channels)
    moved, given = [weight / taps for weight in weights], inputs.scaled(taps)
    for transform in rest.transforms:
        if isinstance(transform, Hadamard):
            turned = rotation(transform, channels)
            moved, given = [turned(weight) for weight in moved], given.mapped(turned)
    form = concrete(moved[0] if len(moved) == 1 else torch.cat(moved), rest.weight)
    spec, shared = _static_input(replace(rest, weight=form, transforms=()), given, None)
    q = _rounded_sample(given, spec, shared)
    solver = spec.solver if isinstance(spec.solver, GPTQ) else GPTQ()
    factor, total = Factor.of(given.gram, solver), 0.0
    for weight, rows in zip(weights, moved, strict=True):
        stored = dequantize(gptq(rows, form, given, solver, factor), form, rows.shape[1])
        total += float((q @ stored.T - inputs.sample @ weight.T).square().sum())
    return total


def _round_sample(x: Tensor, ends: Tensor | None, times: Tensor | None, spec: TensorSpec) -> Tensor:
    if not isinstance(spec.granularity, STATIC):
        return _round_rows(x, ends, times, spec, {})
    found, scale, zero = tables(x, times, spec)
    return _round_rows(x, ends, times, found, _stored_input(found, scale, zero))


def _round_rows(x: Tensor, ends: Tensor | None, times: Tensor | None, spec: TensorSpec, stored: dict[str, Tensor]) -> Tensor:
    """Rows as the layer rounds them. A window of a convolution gets the scale of its whole sample, which ``Inputs.ends`` fix."""
    whole = ends is not None and isinstance(spec.granularity, PerToken)
    given = torch.cat([x, ends], dim=1) if whole and ends is not None else x
    scale, zero = stored.get("input_scale"), stored.get("input_zero")
    if isinstance(spec.granularity, PerLevel):
        assert times is not None
        assert scale is not None
        interval = intervals_of(times, spec.granularity.edges)
        scale, zero = scale[interval, None], None if zero is None else zero[interval, None]
    return round_input(given, spec, scale, zero)[:, : x.shape[1]]


# --- static inputs ---------------------------------------------------------------------------------------------------


def _static_input(
    spec: LayerSpec, inputs: Inputs | None, input_range: tuple[Tensor, Tensor] | None
) -> tuple[LayerSpec, dict[str, Tensor]]:
    """The spec with its input's format found, and what the layer stores of a static input; nothing for dynamic ones."""
    if spec.input is None or not spec.needs_ranges:
        return spec, {}
    if inputs is not None and (spec.transforms or spec.searches_input or input_range is None):
        found, scale, zero = tables(inputs.sample, inputs.times, spec.input, inputs)
        return replace(spec, input=found), _stored_input(found, scale, zero)
    assert input_range is not None
    low, high = input_range
    return spec, _stored_input(spec.input, *scale_of_range(low.clamp(max=0), high.clamp(min=0), spec.input.format))


def _stored_input(spec: TensorSpec, scale: Tensor, zero: Tensor | None) -> dict[str, Tensor]:
    """``input_scale`` and ``input_zero`` as layers store them (``numerics/storage.py``)."""
    found = {"input_scale": scale.float().view(-1)}
    if isinstance(spec.format, Int):
        shifted = torch.zeros_like(scale) if zero is None else zero - 2 ** (spec.format.bits - 1)
        found["input_zero"] = shifted.to(torch.int32).view(-1)
    elif isinstance(spec.format, Float) and zero is not None:
        found["input_zero"] = zero.float().view(-1)
    return found


# --- what rounding does to the inputs --------------------------------------------------------------------------------


def _rounded_sample(inputs: Inputs, spec: LayerSpec, shared: dict[str, Tensor]) -> Tensor:
    if spec.input is None:
        return inputs.sample
    return _round_rows(inputs.sample, inputs.ends, inputs.times, spec.input, shared)


def _input_noise(inputs: Inputs, spec: LayerSpec, shared: dict[str, Tensor]) -> Tensor | None:
    """Mean square of the rounding error of every input, float32 [K]."""
    if spec.input is None:
        return None
    return (_rounded_sample(inputs, spec, shared) - inputs.sample).square().mean(dim=0)


def _bias_shift(weight: Tensor, packed: Packed, spec: LayerSpec, inputs: Inputs, shared: dict[str, Tensor]) -> Tensor:
    """Mean output error over the inputs, float32 [N] (Nagel et al. 2019, arXiv 1906.04721, section 4.2)."""
    stored = dequantize(packed, spec.weight, weight.shape[1])
    moved = (_rounded_sample(inputs, spec, shared) - inputs.sample).mean(dim=0)
    return (weight - stored) @ inputs.mean - stored @ moved

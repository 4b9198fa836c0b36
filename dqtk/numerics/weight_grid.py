"""The grid of one weight: every group's step, zero and table. Solvers find it once and then choose codes on it, each in its own
way.

Fitting the grid (how ranges are found) and choosing codes (rounding, error feedback, learning) are separate, so that every solver
works on every format and granularity.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dqtk.spec import Codebook, E4M3Group, E8M0Group, Float, Int, PerGroup, PerTensor, TensorSpec, TwoLevel

from .affine import code_range, encode, find_scale, nearest_level, squared_error
from .floats import e8m0_decode, step_of
from .group_scales import e4m3_scale, e8m0_scale, tensor_scale
from .packing import Packed, count_groups, max_group_scale, pack, pack_codes, selector_bits


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightGrid:
    """Where the weights [N, K] of a layer may lie.

    stored: the tensors beside the codes, by their names in ``Packed``. step: float32 [N, G]. zero: float32 [N, G] or None, in
    levels. which: int64 [N, G] or None, table of a codebook. G groups of K / G consecutive inputs.
    """

    spec: TensorSpec
    k: int
    stored: dict[str, Tensor]
    step: Tensor
    zero: Tensor | None = None
    which: Tensor | None = None

    def _spread(self, per_group: Tensor, columns: Tensor | None) -> Tensor:
        size = self.k // per_group.shape[1]
        if columns is None:
            return per_group.repeat_interleave(size, dim=1)
        return per_group[:, columns // size]

    def round(self, weight: Tensor, columns: Tensor | None = None) -> Tensor:
        """Nearest points of the grid, float32, of all columns or of ``weight`` [N, C] at ``columns`` (int64 [C])."""
        step = self._spread(self.step, columns)
        y = weight.float() / step
        form = self.spec.format
        if self.which is not None:
            assert isinstance(form, Codebook)
            which, found = self._spread(self.which, columns), torch.empty_like(y)
            for index in range(len(form.tables)):
                found = torch.where(which == index, nearest_level(y, form, index), found)
            return found * step
        if self.zero is None:
            return nearest_level(y, form) * step
        zero = self._spread(self.zero, columns)
        return (nearest_level(y.round() + zero, form) - zero) * step

    def neighbours(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The points of the grid just below and just above every weight [N, K], float32; equal where the weight saturates."""
        step = self._spread(self.step, None)
        y = weight.float() / step
        form = self.spec.format
        if isinstance(form, Int):
            zero = torch.zeros_like(y) if self.zero is None else self._spread(self.zero, None)
            least, most = code_range(form)
            low, high = ((edge + zero).clamp(least, most) - zero for edge in (y.floor(), y.floor() + 1))
            return low * step, high * step
        if isinstance(form, Float):
            assert form.signed
            width = step_of(y, form)
            inner = (y.abs() / width).floor() * width  # towards zero, where a step of the same size ends at the next binade
            inner, outer = nearest_level(inner, form) * step, nearest_level(inner + width, form) * step
            return torch.where(y < 0, -outer, inner), torch.where(y < 0, -inner, outer)
        raise ValueError(f"neighbours: format must be Int or Float, got {form}. Use the solver RTN or GPTQ.")

    def pack(self, values: Tensor) -> Packed:
        """The stored form of values [N, K] that lie on the grid."""
        form, step = self.spec.format, self._spread(self.step, None)
        zero = None if self.zero is None else self._spread(self.zero, None)
        if self.which is None:
            codes = encode(values, step, zero, form)
        else:
            assert isinstance(form, Codebook)
            which, codes = self._spread(self.which, None), torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
            for index in range(len(form.tables)):
                codes = torch.where(which == index, encode(values, step, None, form, index), codes)
        return Packed(qweight=pack_codes(codes, self.spec), **self.stored)


def fit_grid(weight: Tensor, spec: TensorSpec, tensor_amax: Tensor | None = None) -> WeightGrid:
    """Find the grid of a weight.

    Args:
        weight: float [N, K].
        spec: format (a concrete one), granularity and range.
        tensor_amax: absmax [1, 1] of the whole weight where these are only some of its rows (E4M3 groups).
    Raises:
        ValueError: the group size does not divide K.
    """
    weight, (n, k) = weight.float(), weight.shape
    num_groups = count_groups(spec, k)
    granularity = spec.granularity
    if isinstance(granularity, TwoLevel):
        return _fit_two_level(weight, spec, granularity.size)
    rows = weight.reshape(1, -1) if isinstance(granularity, PerTensor) else weight.reshape(-1, k // num_groups)
    if isinstance(granularity, E8M0Group):
        code = e8m0_scale(rows, spec.format, granularity, spec.range).view(n, num_groups)
        return WeightGrid(spec=spec, k=k, stored={"group_scale": code}, step=e8m0_decode(code))
    if isinstance(granularity, E4M3Group):
        above = tensor_scale(weight.abs().amax().view(1, 1) if tensor_amax is None else tensor_amax.view(1, 1), spec.format)
        scale = e4m3_scale(rows, above, spec.format, spec.range).view(n, num_groups)
        return WeightGrid(spec=spec, k=k, stored={"scale": above, "group_scale": scale}, step=scale.float() * above)
    shape = (1, 1) if isinstance(granularity, PerTensor) else (n, num_groups)
    if isinstance(spec.format, Codebook) and len(spec.format.tables) > 1:
        return _fit_tables(rows, spec, shape, k)
    scale, zero = find_scale(rows, spec.format, spec.range)
    scale, zero = _stored_scale(scale.view(shape), spec), None if zero is None else zero.view(shape)
    stored = {"scale": scale} | ({} if zero is None else {"zero": zero.to(torch.uint8)})
    return WeightGrid(spec=spec, k=k, stored=stored, step=scale.float(), zero=zero)


def _stored_scale(scale: Tensor, spec: TensorSpec) -> Tensor:
    """Float scales in the dtype in which they are stored.

    A group's scale has 8 significant bits: float32 would cost half a bit per weight in groups of 64. Codes are chosen on the
    rounded steps, so nothing is lost but 0.2 % of a range.
    """
    return scale.bfloat16() if isinstance(spec.granularity, PerGroup) else scale


def _fit_tables(rows: Tensor, spec: TensorSpec, shape: tuple[int, int], k: int) -> WeightGrid:
    """Every group takes the table that loses least."""
    form = spec.format
    assert isinstance(form, Codebook)
    best, scale, which = None, None, None
    for index in range(len(form.tables)):
        found = _stored_scale(find_scale(rows, form, spec.range, index)[0], spec).float()
        error = squared_error(rows, found, None, form, index)
        if best is None or scale is None or which is None:
            best, scale, which = error, found, torch.zeros_like(error, dtype=torch.int64)
            continue
        better = error < best
        best, scale, which = torch.where(better, error, best), torch.where(better, found, scale), which.masked_fill(better, index)
    assert scale is not None
    assert which is not None
    scale, which = scale.view(shape), which.view(shape)
    stored = {"scale": _stored_scale(scale, spec), "selector": pack(which, selector_bits(form))}
    return WeightGrid(spec=spec, k=k, stored=stored, step=scale, which=which)


def _fit_two_level(weight: Tensor, spec: TensorSpec, size: int) -> WeightGrid:
    """Two-level groups: the float scale of an output channel is set so that its largest group uses the largest integer group scale;
    every group then takes the integer scale with the least squared error among all of them. Searching costs 18 roundings of the
    weight at 4 bits (42 at 3, 127 at 2) and is exact, because group scales are small integers.
    """
    n, k = weight.shape
    form = spec.format
    assert isinstance(form, Int)
    top_code, top_scale = code_range(form)[1], max_group_scale(spec)
    groups = weight.reshape(n, k // size, size)
    group_rows = groups.reshape(-1, size)
    fitted, _ = find_scale(group_rows, form, spec.range)
    # Groups of zeros (or of next to nothing) get scale 1, above their absmax; they must not decide their channel's scale.
    fitted = torch.where(fitted <= group_rows.abs().amax(dim=1, keepdim=True), fitted, torch.zeros_like(fitted))
    scale = fitted.view(n, -1).amax(dim=1, keepdim=True) / top_scale
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    best = torch.full((n, k // size), torch.inf, device=weight.device)
    chosen = torch.ones_like(best)
    for candidate in range(1, top_scale + 1):
        step = (scale * candidate)[..., None]
        error = (torch.clamp((groups / step).round(), -top_code, top_code) * step - groups).square().sum(-1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, float(candidate), chosen)
    return WeightGrid(spec=spec, k=k, stored={"scale": scale, "group_scale": chosen.to(torch.uint8)}, step=scale * chosen)

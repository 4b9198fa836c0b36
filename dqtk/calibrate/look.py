"""What calls show and weights do not: where a layer's input is a concatenation, and which first tokens never change.

Nothing goes by names. A call is made with its concatenations watched, and layers are asked what they were given. Of MixDQ's sites
(arXiv 2405.17873, section 4.1) these are the shortcut convolutions of a UNet's up blocks, which read ``cat([from below, skip])`` as
it is. The first convolution of such a block reads it behind a GroupNorm, which gives both halves one range: nothing to split. A
LayerNorm over all channels leaves their ratio as it was, and so does an activation.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from dqtk.numerics.vector_grid import width_of
from dqtk.plan import Choice
from dqtk.sites import Site
from dqtk.spec import GROUPS, ConstantToken, Hadamard, LayerSpec, ShortcutSplit, Transform

from .gather import calls_of, input_name
from .replay import Call, replay

JOINS = {"cat", "concat", "concatenate"}
COPIES = {"contiguous", "to", "type", "float", "half", "bfloat16", "clone", "dropout"}
PASSES = COPIES | {"layer_norm", "rms_norm", "relu", "silu", "gelu"}
"""Functions that hand channels on in their places, and halves with their ratio."""
SAME = 2.0**-6  # of a token's norm: how far rounding in the encoder may move it


def looked(module: nn.Module, calls: Sequence[Call], work: Sequence[Choice]) -> tuple[list[Choice], dict[str, Tensor]]:
    """The choices of one component with what they look for found or left out, and the constant tokens [K] by ``input_name``.

    Warns (``UserWarning``) of a layer that stays whole, because its parts do not fit its groups, vectors or branch.
    """
    asked = [choice for choice in work if isinstance(choice.spec, LayerSpec) and choice.spec.looks]
    if not asked:
        return list(work), {}
    mine = calls_of(calls, asked[0].site.component)
    split = [choice.site for choice in asked if isinstance(choice.spec, LayerSpec) and ShortcutSplit() in choice.spec.transforms]
    token = [choice.site for choice in asked if isinstance(choice.spec, LayerSpec) and ConstantToken() in choice.spec.transforms]
    at = concatenations(module, mine[0], split)
    tokens = first_tokens(module, mine, token)
    return [_answered(choice, at, tokens) if choice in asked else choice for choice in work], tokens


def _answered(choice: Choice, at: Mapping[str, tuple[int, ...]], tokens: Mapping[str, Tensor]) -> Choice:
    spec = choice.spec
    assert isinstance(spec, LayerSpec)
    found: list[Transform] = []
    for transform in spec.transforms:
        if isinstance(transform, ShortcutSplit) and not transform.at:
            places = at.get(choice.site.path, ())
            if places and _fits(spec, choice.site, places):
                found.append(ShortcutSplit(at=places))
        elif not isinstance(transform, ConstantToken) or input_name(choice.site) in tokens:
            found.append(transform)
    return replace(choice, spec=replace(spec, transforms=tuple(found)))


def _fits(spec: LayerSpec, site: Site, places: tuple[int, ...]) -> bool:
    bounds = (0, *places, site.channels)
    widths = [b - a for a, b in pairwise(bounds)]
    granularities = [tensor.granularity for tensor in (spec.weight, spec.input) if tensor is not None]
    steps = [g.size for g in granularities if isinstance(g, GROUPS)]
    steps.append(width_of(spec.weight))
    steps += [4 for transform in spec.transforms if isinstance(transform, Hadamard)]
    least = 1 if spec.low_rank is None else spec.low_rank.rank
    good = all(width % step == 0 for width in widths for step in steps) and min(widths) >= least
    if not good:
        warnings.warn(
            f"quantize: {site.id} stays whole: its input is joined of {widths} channels, which its groups, vectors or branch do "
            "not fit.",
            stacklevel=2,
        )
    return good


# --- concatenations --------------------------------------------------------------------------------------------------


class _Watch(TorchFunctionMode):
    """Remembers, of tensors that live, along which dimension and where they were joined."""

    def __init__(self) -> None:
        super().__init__()
        self.seams: Any = WeakTensorKeyDictionary()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in JOINS and isinstance(result, Tensor):
            self._joined(result, args, kwargs)
        elif name in PASSES and args and isinstance(args[0], Tensor) and isinstance(result, Tensor):
            seam = self.seams.get(args[0])
            if seam is not None and result.shape == args[0].shape:
                self.seams[result] = seam
        return result

    def _joined(self, result: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> None:
        parts = args[0] if args else kwargs["tensors"]
        dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0)) % max(1, result.ndim)
        places, start = set(), 0
        for part in parts:
            if part.ndim != result.ndim:
                continue  # torch lets empty tensors of any shape through
            inner = self.seams.get(part, (dim, ()))
            places |= {start} | ({start + place for place in inner[1]} if inner[0] == dim else set())
            start += part.shape[dim]
        self.seams[result] = (dim, tuple(sorted(place for place in places if 0 < place < start)))

    def of(self, x: Tensor, dim: int) -> tuple[int, ...]:
        """Where ``x`` was joined along ``dim``."""
        seam = self.seams.get(x, (dim, ()))
        return seam[1] if seam[0] == dim % x.ndim else ()


def concatenations(module: nn.Module, call: Call, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
    """Path -> input channels at which parts of a layer's input begin, of the sites whose input is a concatenation along them.

    Works on the meta device. Raises ``ValueError`` for a site that the call does not reach.
    """
    found: dict[str, set[tuple[int, ...]]] = {site.path: set() for site in sites}

    def see(site: Site, watch: _Watch):
        dim = 1 if site.kind == "conv" else -1
        return lambda x, call: found[site.path].add(watch.of(x, dim))

    with _Watch() as watch:
        replay(module, [call], {site.path: see(site, watch) for site in sites})
    return {path: next(iter(places)) for path, places in found.items() if len(places) == 1 and places != {()}}


# --- constant first tokens -------------------------------------------------------------------------------------------


def first_tokens(module: nn.Module, calls: Sequence[Call], sites: Sequence[Site]) -> dict[str, Tensor]:
    """Name of an input -> its first token, bfloat16 [K], where that is the same in all calls up to rounding and the rest is not.

    Calls of one noise level per run of the pipeline are made: other prompts are what could change it. Zeros, as SDXL has for an
    empty negative prompt, are no token.
    """
    first = {input_name(site): site for site in reversed(sites)}
    rows: dict[str, list[Tensor]] = {name: [] for name in first}
    rest: dict[str, list[Tensor]] = {name: [] for name in first}

    def see(name: str):
        def keep(x: Tensor, call: Call) -> None:
            if x.ndim > 2 and x.shape[-2] > 1:
                tokens = x.detach().reshape(-1, *x.shape[-2:])
                rows[name].append(tokens[:, 0].float().cpu())
                rest[name].append(tokens[:, 1:].float().mean(dim=1).cpu())

        return keep

    replay(module, _one_level(calls), {site.path: see(name) for name, site in first.items()})
    found = {name: _constant(torch.cat(rows[name]), torch.cat(rest[name])) for name in first if rows[name]}
    return {name: token for name, token in found.items() if token is not None}


def _one_level(calls: Sequence[Call]) -> list[Call]:
    """Of every run the calls at its first time; all of a text encoder."""
    times: dict[int, float | None] = {}
    for call in calls:
        times.setdefault(call.run, call.time)
    return [call for call in calls if call.level is None or call.time == times[call.run]]


def _constant(rows: Tensor, rest: Tensor) -> Tensor | None:
    """The one token of ``rows`` [R, K], if what stands beside it, ``rest`` [R, K], shows that prompts differed."""
    there = rows.abs().amax(dim=1) > 0
    rows, rest = rows[there], rest[there]
    if len(rows) < 2:
        return None
    token = rows[0].bfloat16()
    same = bool(((rows - rows[0]).norm(dim=1) <= SAME * rows[0].norm()).all())
    varied = bool(((rest - rest[0]).norm(dim=1) > SAME * rest[0].norm()).any())
    return token if same and varied else None

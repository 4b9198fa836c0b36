"""What a layer admits of a spec: groups that divide its channels, no second moments of gigabytes, no words that outweigh it.

And whether a plan is of a model at all."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from .numerics.hadamard import block_size
from .numerics.packing import book_shape, stored_bytes
from .numerics.vector_grid import width_of
from .plan import Choice, Plan
from .sites import TEXT_ENCODERS, Site, find_attention, find_sites
from .spec import (
    GROUPS,
    ROLE,
    RTN,
    ByLevel,
    ConstantToken,
    Dynamic,
    E4M3Group,
    E8M0Group,
    Float,
    Hadamard,
    Int,
    LayerSpec,
    PerChannel,
    PerLevel,
    PerTensor,
    PerToken,
    ShortcutSplit,
    SiteSpec,
    TensorSpec,
    Transform,
    VectorCodebook,
    each_of,
    shared_forms,
    weights_of,
    without,
)

MAX_LEARNED_INPUTS = 16384  # of a layer: its second moments take 2 GiB
MANY_WORDS = 256  # of a book: above, small layers and groups would be smaller at 8 bits


def fit(spec: SiteSpec, site: Site) -> tuple[SiteSpec, str]:
    """Adjust a spec to what a layer admits, with a note that says so (empty when nothing changed)."""
    notes: list[str] = []
    if isinstance(spec, ByLevel) and TEXT_ENCODERS.fullmatch(site.component):
        notes.append("one spec: runs once, before there is noise")
        spec = spec.longest
    adjusted = each_of(spec, lambda part: _fit(part, site, notes))
    return adjusted, "; ".join(dict.fromkeys(notes))  # weight and input may have the same to say, and so may kinds


def check_fit(plan: Plan, parts: Mapping[str, Any], where: str = "quantize") -> None:
    """Raises ``ValueError`` that names the first component or site of a plan that is not in the model."""
    for component in plan.components:
        if component.name not in parts:
            raise ValueError(
                f"{where}: plan must be for components {sorted(parts)}, got {component.name}. Make a plan for this model."
            )
        shapes = {site.id: site.shape for site in find_sites(parts[component.name], component.name)}
        for site in (choice.site for choice in plan.choices if choice.site.component == component.name):
            if shapes.get(site.id) != site.shape:
                raise ValueError(
                    f"{where}: plan must fit the model at {site.id}: {site.shape}, got {shapes.get(site.id)}. "
                    "Make a plan for this model."
                )
        known = set(find_attention(parts[component.name], component.name)) if plan.attention else set()
        for place in (choice.site for choice in plan.attention if choice.site.component == component.name):
            if place not in known:
                raise ValueError(
                    f"{where}: plan must fit the model at {place.id}, an attention of {place.heads} heads, got none. "
                    "Make a plan for this model."
                )


def worth_their_books(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Groups of layers that would be larger with their many shared words than at 8 bits become 8 bits per channel, and say so."""
    sharing: dict[tuple[str, VectorCodebook], list[tuple[Site, TensorSpec]]] = {}
    for choice in choices:
        for part in () if choice.spec is None else (weight[0] for weight in weights_of(choice.spec)):
            form = part.weight.format
            if isinstance(form, VectorCodebook) and form.group is not None:
                sharing.setdefault((choice.site.component, form), []).append((choice.site, part.weight))
    notes = {}
    for (component, form), layers in sharing.items():
        stored = sum(stored_bytes(tensor, site.n, site.k) for site, tensor in layers) + 2 * math.prod(book_shape(form))
        if form.words > MANY_WORDS and stored > sum(site.n * site.k for site, _ in layers):
            many = f"{len(layers)} layers" if len(layers) > 1 else "one layer"
            what = f"group {form.group!r}, {many} with {form.words} words of {form.length}, would take more"
            notes[component, form] = f"8 bit per channel: {what}"
    return tuple(_without_books(choice, notes) for choice in choices)


def _fit(spec: LayerSpec, site: Site, notes: list[str]) -> LayerSpec:
    spec = _fit_vectors(_of_role(spec, site), site, notes)
    spec = replace(spec, weight=_fit_group(spec.weight, site, "8 bit per channel", notes))
    if spec.input is not None and isinstance(spec.input.granularity, GROUPS):
        given = _fit_group(spec.input, site, "8 bit per token", notes)
        spec = replace(spec, input=given)
    if spec.input is not None and isinstance(spec.input.granularity, PerLevel) and TEXT_ENCODERS.fullmatch(site.component):
        spec = replace(spec, input=replace(spec.input, granularity=PerTensor()))
        notes.append("one range: runs once, before there is noise")
    if site.kind == "conv" and ConstantToken() in spec.transforms:
        spec = without(spec, ConstantToken)
        notes.append("no constant token: convolution")
    if site.kind == "conv" and spec.low_rank is not None:
        spec = replace(spec, low_rank=None)
        notes.append("no low-rank branch: convolution")
    if spec.low_rank is not None and spec.low_rank.rank > min(site.n, site.k):
        most = min(site.n, site.k)
        notes.append(f"rank {most}: {spec.low_rank.rank} is more than the layer has")
        spec = replace(spec, low_rank=replace(spec.low_rank, rank=most))
    if site.channels % 4 and any(isinstance(transform, Hadamard) for transform in spec.transforms):
        spec = without(spec, Hadamard)
        notes.append(f"not rotated: {site.channels} channels are no multiple of 4")
    if ShortcutSplit not in {type(transform) for transform in spec.transforms}:  # parts have blocks of their own
        spec = replace(spec, transforms=tuple(_fit_block(transform, site, notes) for transform in spec.transforms))
    if spec.needs_moments and site.k > MAX_LEARNED_INPUTS:
        spec = replace(spec, solver=RTN(), low_rank=None)
        notes.append(f"rounded to nearest: second moments of {site.k} inputs would take {8 * site.k**2 / 2**30:.1f} GiB")
    if spec.correct_bias and not site.bias:
        spec = replace(spec, correct_bias=False)
        notes.append("no bias to correct")
    return spec


def _fit_block(transform: Transform, site: Site, notes: list[str]) -> Transform:
    """A rotation in blocks that divide the channels and have a matrix: what would be used anyway, said."""
    if not isinstance(transform, Hadamard) or transform.block is None:
        return transform
    size = block_size(site.channels, transform.regular, transform.block)
    if size == transform.block:
        return transform
    kind = "regular blocks" if transform.regular else "blocks"
    notes.append(f"rotated in blocks of {size}: {site.channels} channels have no {kind} of {transform.block}")
    return replace(transform, block=size)


def _of_role(spec: LayerSpec, site: Site) -> LayerSpec:
    """The group of shared books with the layer's role in its name, where a rule left it open."""
    form = spec.weight.format
    if not isinstance(form, VectorCodebook) or form.group is None:
        return spec
    group = form.group.replace(ROLE, site.role.replace(".", "_"))
    return replace(spec, weight=replace(spec.weight, format=replace(form, group=group)))


def _fit_vectors(spec: LayerSpec, site: Site, notes: list[str]) -> LayerSpec:
    """Vectors whose length divides the channels, and whose books are worth it; else 8 bits per channel, rounded to nearest."""
    length, form = width_of(spec.weight), spec.weight.format
    if site.channels % length:
        notes.append(f"8 bit per channel: vectors of {length} do not divide {site.channels} channels")
    elif isinstance(form, VectorCodebook) and _outweighed(spec.weight, site):
        notes.append(f"8 bit per channel: with its own {form.words} words of {length} the layer would take more")
    else:
        return spec
    return _eight_bits(spec)


def _eight_bits(spec: LayerSpec) -> LayerSpec:
    return replace(spec, weight=TensorSpec(format=Int(bits=8), granularity=PerChannel()), solver=RTN())


def _outweighed(tensor: TensorSpec, site: Site) -> bool:
    """Whether a layer with many words of its own would be larger than at 8 bits."""
    form = tensor.format
    many = isinstance(form, VectorCodebook) and form.group is None and form.words > MANY_WORDS
    return many and stored_bytes(tensor, site.n, site.k) > site.n * site.k


def _without_books(choice: Choice, notes: Mapping[tuple[str, VectorCodebook], str]) -> Choice:
    mine = {form: note for (component, form), note in notes.items() if component == choice.site.component}
    said = [mine[form] for form in shared_forms(choice.spec) if form in mine]
    if choice.spec is None or not said:
        return choice
    spec = each_of(choice.spec, lambda part: _eight_bits(part) if part.weight.format in mine else part)
    return replace(choice, spec=spec, why="; ".join([choice.why, *said]))


def _fit_group(tensor: TensorSpec, site: Site, otherwise: str, notes: list[str]) -> TensorSpec:
    """A group size that divides the channels: half or a quarter of the wish, else ``otherwise``."""
    granularity = tensor.granularity
    if not isinstance(granularity, GROUPS) or site.channels % granularity.size == 0:
        return tensor
    wish = granularity.size
    size = next((s for s in (wish // 2, wish // 4) if s >= 8 and s % 8 == 0 and site.channels % s == 0), None)
    if size is not None and (size >= 16 or isinstance(granularity, E8M0Group | E4M3Group)):
        notes.append(f"groups of {size}: {wish} does not divide {site.channels} channels")
        return replace(tensor, granularity=replace(granularity, size=size))
    eight = Int(bits=8) if isinstance(tensor.format, Int) else Float()
    notes.append(f"{otherwise}: no group of {wish} or its half or quarter divides {site.channels} channels")
    if isinstance(tensor.range, Dynamic):
        return TensorSpec(format=eight, granularity=PerToken(), range=Dynamic())
    return replace(tensor, format=eight, granularity=PerChannel())

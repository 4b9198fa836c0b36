"""What a refiner is asked, held against the plan and the calls, before a layer is replaced: a choice that would do nothing for a
weight is an error, not a choice that is passed over.
"""

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from dqtk.calibrate.guidance import guided_steps
from dqtk.calibrate.levels import bucket_of
from dqtk.calibrate.replay import Call
from dqtk.nn.products import group_of
from dqtk.spec import (
    VECTORS,
    Distill,
    LayerSpec,
    MostSensitive,
    OfRoles,
    Reconstruct,
    Refiner,
    SiteSpec,
    Trellis,
    VectorCodebook,
    describe,
)

from .learning import seen_and_unseen
from .selection import no_steps, paths_of_roles


def check_learners(
    name: str, module: nn.Module, choice: Refiner, specs: Mapping[str, SiteSpec], originals: Collection[str] = ()
) -> None:
    """Whether the layers can learn as the choice has it.

    Args:
        name: of the denoiser.
        module: the denoiser, before or after its layers are replaced.
        choice: which refiner, and how.
        specs: path -> how a layer is, or will be, quantized.
        originals: paths of the layers whose unquantized form is at hand.
    Raises:
        ValueError: roles that no layer has; ``MostSensitive``, ``decay`` or ``exact_start`` for vectors; ``discrete`` for trellises
            or where no words learn; ``candidates`` for other weights than words of one book that are not transformed; layers whose
            unquantized form is asked for and not at hand; shared books that some layers of a group would learn, or block by block.
    """
    whole = {path: spec for path, spec in specs.items() if isinstance(spec, LayerSpec)}
    vectors = [path for path, spec in whole.items() if isinstance(spec.weight.format, VECTORS)]
    if isinstance(choice, Reconstruct):
        _check_groups(name, whole, ())
        asked = [path for path in vectors if not _chooses(whole[path])] if vectors else list(whole)
        if choice.candidates > 1 and asked:
            raise ValueError(
                "refine: candidates must be 1 for weights other than words of one book without transforms, got "
                f"{choice.candidates} for {asked[0]} of {name}: {describe(whole[asked[0]])}. Leave it out."
            )
        return
    if isinstance(choice.layers, MostSensitive) and vectors:
        raise no_steps(vectors[0])
    learning = paths_of_roles(name, module, specs, choice.layers) if isinstance(choice.layers, OfRoles) else list(specs)
    if learning:
        _check_groups(name, whole, learning)
    if choice.discrete is not None:
        _check_words(name, {path: whole[path].weight.format for path in learning if path in whole})
    for what, value, plain in (("decay", choice.decay, None), ("exact_start", choice.exact_start, False)):
        if value == plain:
            continue
        if mine := [path for path in learning if path in vectors]:
            raise ValueError(
                f"refine: {what} must be {plain} for weights that are vectors, which have no next code to move to, got {value} for "
                f"{mine[0]} of {name}. Leave it out, or name other layers with layers=OfRoles(...)."
            )
        if missing := [path for path in learning if path not in originals]:
            raise ValueError(
                f"refine: {what} must be {plain} for layers whose unquantized form is not at hand, got {value} for {missing[0]} of "
                f"{name}. Quantize and refine in one call, or pass the layers that were replaced as originals."
            )


def _check_groups(name: str, specs: Mapping[str, LayerSpec], learning: Collection[str]) -> None:
    """Whether shared books learn in all layers that read them; without paths: whether there are none."""
    alone = {group_of(spec) for path, spec in specs.items() if path not in learning} - {None}
    for path in learning or specs:
        group = group_of(specs[path]) if path in specs else None
        if group is not None and group in alone:
            what = "layers must hold all that share books or none" if learning else "blocks must have books of their layers' own"
            remedy = "Name all of their roles" if learning else "Take Distill(), which learns all layers at once"
            others = any(group_of(spec) == group for other, spec in specs.items() if other != path)
            said = ", which others read too" if others else ""
            raise ValueError(
                f"refine: {what}, got group {group!r} of {path} of {name}{said}. {remedy}, or quantize with group=None."
            )


def _check_words(name: str, forms: Mapping[str, object]) -> None:
    """Whether discrete steps have words to change, and nothing learns whose codes they would have to pass over."""
    if ring := next((path for path, form in forms.items() if isinstance(form, Trellis)), None):
        raise ValueError(
            f"refine: discrete must be None for trellises, whose codes are walks and have no other word to change to, got one at "
            f"{ring} of {name}. Leave it out, or name other layers with layers=OfRoles(...)."
        )
    if not any(isinstance(form, VectorCodebook) for form in forms.values()):
        raise ValueError(
            f"refine: discrete must be None where no weights that are words of books learn, got none among {len(forms)} layers of "
            f"{name}. Leave it out: codes of numbers learn at weight_rate."
        )


def _chooses(spec: LayerSpec) -> bool:
    """Whether the vectors of a weight can choose among words."""
    form = spec.weight.format
    return isinstance(form, VectorCodebook) and form.books == 1 and not spec.transforms


def check_lessons(name: str, module: nn.Module, choice: Refiner, layers: Collection[str], calls: Sequence[Call]) -> None:
    """Whether kept calls are what the choice learns from.

    Raises ``ValueError`` for calls of one run, ``influence`` that counts no call and ``guidance`` over calls without both halves.
    """
    groups = seen_and_unseen(name, layers, [call.run for call in calls])
    if isinstance(choice, Distill):
        counts_of(name, calls, choice, groups)
        lessons_of(name, module, calls, choice)


def counts_of(name: str, calls: Sequence[Call], choice: Distill, groups: Sequence[Sequence[int]]) -> list[float]:
    """How much each call's error counts. Raises ``ValueError`` where none of a group does."""
    num = len(choice.influence)
    counts = [choice.influence[bucket_of(call.level or 0.0, num)] if num else 1.0 for call in calls]
    if not all(any(counts[index] for index in group) for group in groups):
        raise ValueError(
            f"refine: influence must count some calls of {name}, of those learned from and of those held out, got none. Measure "
            "it on the schedule of calibration."
        )
    return counts


def lessons_of(name: str, module: nn.Module, calls: Sequence[Call], choice: Distill) -> list[tuple[int, ...]]:
    """Numbers of the calls whose errors are one: of every call, or with ``guidance`` of those of a step that hold its two halves,
    or of a step's one call where the pipeline leaves guidance out.

    Raises ``ValueError`` where ``guidance`` is asked for calls that are not known to hold both.
    """
    return [(index,) for index in range(len(calls))] if choice.guidance is None else guided_steps(name, module, calls)

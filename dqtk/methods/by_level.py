"""Sites that share an input -> their layers, where the spec may depend on the noise level: every weight is solved once.

A weight that serves several specs is solved for the one that ``ByLevel.weights`` puts first; the others read its codes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from dqtk.calibrate.gather import Inputs
from dqtk.numerics.storage import stored_name
from dqtk.spec import ByLevel, LayerSpec, SiteSpec

from .solve import Solution, solve

Range = tuple[Tensor, Tensor]


def solve_site(
    weights: Sequence[Tensor],
    spec: SiteSpec,
    inputs: Inputs | None = None,
    *,
    channels: int | None = None,
    range_for: Callable[[LayerSpec], Range | None] = lambda spec: None,
    token: Tensor | None = None,
    books: Mapping[str, Tensor] | None = None,
) -> list[Solution]:
    """As ``solve``, one solution per weight. ``range_for``: the ``input_range`` of a spec, where it needs one."""

    def solved(part: LayerSpec) -> list[Solution]:
        mine = inputs if part.needs_inputs else None
        return solve(weights, part, mine, channels=channels, input_range=range_for(part), token=token, books=books)

    if isinstance(spec, LayerSpec):
        return solved(spec)
    by_weight = [(weight, solved(weight[0])) for weight in spec.weights]
    return [_joined(spec, [(weight, found[index]) for weight, found in by_weight]) for index in range(len(weights))]


def _joined(spec: ByLevel, parts: Sequence[tuple[tuple[LayerSpec, ...], Solution]]) -> Solution:
    """One layer's weights with its searches answered in the spec."""
    answers: dict[LayerSpec, LayerSpec] = {}
    tensors: dict[str, Tensor] = {}
    for index, (weight, solution) in enumerate(parts):
        found = solution.spec
        assert isinstance(found, LayerSpec)
        answers |= {part: replace(part, weight=found.weight) for part in weight[1:]} | {weight[0]: found}
        tensors |= {stored_name(name, index): tensor for name, tensor in solution.tensors.items()}
    made = spec.each(lambda part: answers[part])
    assert isinstance(made, ByLevel)
    assert [weight[0] for weight in made.weights] == [answers[weight[0]] for weight, _ in parts]
    return Solution(spec=made, tensors=tensors)

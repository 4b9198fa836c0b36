"""Which layers are solved together and from which inputs, in what order, within a memory limit.

Layers that share an input and a spec are one group: their statistics are gathered once, and a low-rank branch is shared. Groups
whose statistics fit into the limit together are one stage: the kept calls are replayed once per stage. Inputs come from the
unquantized model (everything is solved before anything is replaced), or, ``sequential``, from the model as it is quantized so
far, block by block.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import Stats
from .calibrate.gather import Inputs, calls_of, gather, gram_bytes, input_name
from .calibrate.intervals import ranges_at
from .calibrate.look import looked
from .calibrate.replay import waypoint_for
from .calibrate.squares import mean_squares
from .calibrate.waypoint import Waypoint
from .kernels import to_matrix
from .methods.by_level import solve_site
from .methods.shared_books import SharedVectors, basis_of
from .methods.solve import Solution
from .plan import Choice
from .sites import repeated_block
from .solved import SolvedFolder
from .spec import ConstantToken, LayerSpec, level_edges, shared_forms, weights_of

Solved = list[tuple[Choice, Solution]]
SharedBooks = Mapping[str, Mapping[str, Tensor]]  # component -> group -> float16 [books, words, length]


def solutions(
    parts: Mapping[str, nn.Module],
    work: Sequence[Choice],
    stats: Stats | None,
    *,
    sequential: bool,
    max_memory: int,
    solved: Callable[[int], object] = lambda num: None,
    kept: SolvedFolder | None = None,
    books: SharedBooks | None = None,
) -> Iterator[Solved]:
    """Solve all choices, a group at a time. What is yielded may be put into the model at once.

    Args:
        parts: components by name.
        work: choices with a spec.
        stats: needed if some spec needs them.
        sequential: take inputs from the partly quantized model.
        max_memory: bytes that second moments may take at a time; one input's are taken whatever they are.
        solved: told how many layers have just been solved, which may be long before they are yielded.
        kept: where groups that learn from inputs are put and found again; its processes share them. Not held in memory then.
        books: those that layers share, as ``shared_books`` learns them.
    """
    for component, mine in groupby(work, key=lambda choice: choice.site.component):
        choices, tokens = looked(parts[component], stats.calls if stats else (), list(mine))
        waypoint = _waypoint(parts[component], component, choices, stats, max_memory)
        groups = _groups(choices, waypoint)
        how: dict[str, Any] = {"stats": stats, "tokens": tokens, "solved": solved, "waypoint": waypoint}
        how["books"] = (books or {}).get(component, {})
        if sequential:
            for stage in _stages(groups, max_memory, by_block=True):
                yield from list(_solved(parts[component], stage, **how))
            continue
        learning: list[list[Choice]] = [group for group in groups if _learns(group)]
        held: list[Solved] = []
        share = learning if kept is None else kept.mine(learning)
        for stage in _stages(share, max_memory, by_block=False):
            for found in _solved(parts[component], stage, **how):
                if kept is None:
                    held.append(found)
                else:
                    kept.put(found)
        if waypoint is not None:
            waypoint.leave()
        if kept is not None:
            kept.wait()
            solved(sum(map(len, learning)) - sum(map(len, share)))
        yield from held if kept is None else map(kept.get, learning)
        for group in groups:
            if not _learns(group):
                yield from _solved(parts[component], [group], **how)


@torch.no_grad()
def shared_books(parts: Mapping[str, nn.Module], work: Sequence[Choice], stats: Stats | None) -> dict[str, dict[str, Tensor]]:
    """Learn the books that layers of these choices share, from the original model: one pass over its weights, and of components
    where such layers learn from inputs one replay of the kept calls. Arguments: as of ``solutions``."""
    found: dict[str, dict[str, Tensor]] = {}
    for component, mine in groupby(work, key=lambda choice: choice.site.component):
        solved_for = [(choice, weight[0]) for choice in mine if choice.spec is not None for weight in weights_of(choice.spec)]
        sharing = [(choice, part) for choice, part in solved_for if shared_forms(part)]
        if not sharing:
            continue
        vectors = SharedVectors((part, choice.site.num_weights) for choice, part in sharing)
        learning = [(choice.site, part) for choice, part in sharing if part.needs_moments]
        wanted = {(input_name(site), part.transforms): (site, basis_of(part, site.channels)) for site, part in learning}
        squares: Mapping[Any, Tensor] = {}
        if wanted:
            assert stats is not None
            squares = mean_squares(parts[component], stats.calls, wanted)
        for choice, part in sharing:
            seen = squares[input_name(choice.site), part.transforms] if part.needs_moments else None
            vectors.add(_matrix(parts[component], choice), part, choice.site.channels, seen)
        found[component] = vectors.books()
    return found


def _learns(group: Sequence[Choice]) -> bool:
    return group[0].spec is not None and group[0].spec.needs_inputs


def _needs_moments(group: Sequence[Choice]) -> bool:
    return group[0].spec is not None and group[0].spec.needs_moments


def _waypoint(module: nn.Module, component: str, work: Sequence[Choice], stats: Stats | None, max_memory: int) -> Waypoint | None:
    """Where replays begin; None where nothing is replayed."""
    if stats is None or not any(_learns([choice]) for choice in work):
        return None
    return waypoint_for(module, calls_of(stats.calls, component), [choice.site.path for choice in work], max_memory)


def _groups(work: list[Choice], waypoint: Waypoint | None) -> list[list[Choice]]:
    """Choices that share an input and a spec, in the order in which the model reaches them where that is known."""
    if waypoint is not None:
        order = {path: index for index, path in enumerate(waypoint.counts)}
        work = sorted(work, key=lambda choice: order.get(choice.site.path, len(order)))
    found: dict[object, list[Choice]] = {}
    for choice in work:
        key = (input_name(choice.site), choice.spec) if _learns([choice]) else choice.site.id
        found.setdefault(key, []).append(choice)
    return list(found.values())


def _stages(groups: Sequence[list[Choice]], max_memory: int, *, by_block: bool) -> Iterator[list[list[Choice]]]:
    """Consecutive groups whose statistics fit together, and that lie in one block if asked for."""
    stage: list[list[Choice]] = []
    taken, block = 0, None
    for group in groups:
        mine = gram_bytes(group[0].site) if _needs_moments(group) else 0
        here = repeated_block(group[0].site.path) if by_block else None
        if stage and (taken + mine > max_memory or here != block):
            yield stage
            stage, taken = [], 0
        stage.append(group)
        taken, block = taken + mine, here
    if stage:
        yield stage


@torch.no_grad()
def _solved(
    module: nn.Module,
    stage: Sequence[list[Choice]],
    *,
    stats: Stats | None,
    tokens: Mapping[str, Tensor],
    solved: Callable[[int], object],
    waypoint: Waypoint | None,
    books: Mapping[str, Tensor],
) -> Iterator[Solved]:
    sites = [choice.site for group in stage if _learns(group) for choice in group]
    assert stats is not None or not sites
    asked = {input_name(group[0].site) for group in stage if _needs_moments(group)}
    apart = {input_name(group[0].site) for group in stage if _has_token(group)}
    inputs: dict[bool, Mapping[str, Inputs]] = {True: {}, False: {}}
    if stats is not None and sites:
        without = {input_name(site) for site in sites} - asked
        whole = [choice.site for group in stage if not _has_token(group) for choice in group if input_name(choice.site) in apart]
        mine = {name: tokens[name] for name in apart}
        now = [site for site in sites if site not in whole]
        found = gather(module, stats.calls, now, without_moments=without, tokens=mine, waypoint=waypoint)
        inputs = {True: found, False: found}
        if whole:  # an input that one layer sees without its token, another with it
            inputs[False] = {**found, **gather(module, stats.calls, whole, without_moments=without)}
    for group in stage:
        constant = tokens[input_name(group[0].site)] if _has_token(group) else None
        solution = _solve_group(module, group, inputs[_has_token(group)], stats, constant, books)
        solved(len(solution))
        yield solution


def _has_token(group: Sequence[Choice]) -> bool:
    return isinstance(group[0].spec, LayerSpec) and ConstantToken() in group[0].spec.transforms


def _solve_group(
    module: nn.Module,
    group: list[Choice],
    inputs: Mapping[str, Inputs],
    stats: Stats | None,
    token: Tensor | None,
    books: Mapping[str, Tensor],
) -> Solved:
    site, spec = group[0].site, group[0].spec
    assert spec is not None

    def range_for(part: LayerSpec) -> tuple[Tensor, Tensor] | None:
        if not part.needs_ranges or part.searches_input or part.transforms:
            return None
        assert stats is not None
        edges = level_edges(part)
        return ranges_at(stats, site.id, edges) if edges else stats.input_range(site.id)

    found = solve_site(
        [_matrix(module, choice) for choice in group],
        spec,
        inputs.get(input_name(site)) if spec.needs_inputs else None,
        channels=site.channels,
        range_for=range_for,
        token=token,
        books=books,
    )
    return list(zip(group, found, strict=True))


def _matrix(module: nn.Module, choice: Choice) -> Tensor:
    weight = module.get_submodule(choice.site.path).weight
    assert isinstance(weight, Tensor)
    return (weight if weight.ndim == 2 else to_matrix(weight)).detach()

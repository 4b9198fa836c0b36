"""Which layers learn: those of some roles, or those to which the error is most sensitive (QuEST, Wang et al. 2024, arXiv
2402.03666).

QuEST trains 7 % of the weights, chosen by hand for UNets. Here a share may also be chosen by looking: the mean gradient per code
over some calls says how much a layer's codes could lower the error at once. A layer that does not learn keeps its codes; biases,
norms and tables learn whatever is chosen.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from dqtk.nn import Quantized
from dqtk.resolve import adapters
from dqtk.sites import find_sites
from dqtk.spec import MostSensitive, OfRoles, Selection, did_you_mean

from .team import Team
from .trained import CODES, training
from .trained_vectors import TrainedVectors


def selected(
    name: str,
    module: nn.Module,
    layers: Mapping[str, Quantized],
    choice: Selection | None,
    loss: Callable[[int], Tensor],
    team: Team,
) -> dict[str, Quantized]:
    """Of these layers, by path, those that learn, in their order. ``loss``: number of a call -> scalar.

    Raises:
        ValueError: roles that no quantized layer has.
    """
    if choice is None:
        return dict(layers)
    if isinstance(choice, OfRoles):
        return {path: layers[path] for path in paths_of_roles(name, module, layers, choice)}
    assert isinstance(choice, MostSensitive)
    scores = sensitivities(layers, loss, choice.calls, team)
    sizes = {path: layer.n * layer.k for path, layer in layers.items()}  # type: ignore[attr-defined]
    chosen: set[str] = set()
    left = choice.share * sum(sizes.values())
    for path in sorted(scores, key=lambda path: -scores[path]):
        if not chosen or sizes[path] <= left:
            chosen.add(path)
            left -= sizes[path]
    return {path: layer for path, layer in layers.items() if path in chosen}


def paths_of_roles(name: str, module: nn.Module, layers: Iterable[str], choice: OfRoles) -> list[str]:
    """Of these paths of layers that are, or will be, quantized, those with one of the roles. Raises ``ValueError`` for a role that
    none has."""
    roles = {site.path: site.role for site in find_sites(module, name, adapters().get(type(module).__name__))}
    mine = {path: roles[path] for path in layers}
    found = set(mine.values())
    for role in choice.roles:
        if role not in found:
            raise ValueError(
                f"refine: OfRoles must name roles of quantized layers of {name} ({', '.join(sorted(found))}), got {role!r}."
                f"{did_you_mean(role, found) or ' Leave it out.'}"
            )
    return [path for path, role in mine.items() if role in choice.roles]


def no_steps(path: str) -> ValueError:
    """That a layer of vectors has no sensitivity per step of a grid."""
    return ValueError(
        f"refine: MostSensitive must be asked of layers whose weights are numbers on a grid, got vectors at {path}. "
        "Name roles with OfRoles."
    )


def sensitivities(layers: Mapping[str, Quantized], loss: Callable[[int], Tensor], calls: int, team: Team) -> dict[str, float]:
    """Mean size of the gradient of the mean error over some calls with respect to a code, by path: error per step of the grid.

    Raises ``ValueError`` for vectors, whose codes have no next step.
    """
    with training(layers, None, torch.Generator()) as trained, torch.enable_grad():
        if vectors := [mine.path for mine in trained.values() if isinstance(mine, TrainedVectors)]:
            raise no_steps(vectors[0])
        for index in range(team.rank, calls, team.world):
            (loss(index) / calls).backward()
        found = dict.fromkeys(layers, 0.0)
        for mine in trained.values():
            codes = mine.parameters[CODES[0]]
            grad = torch.zeros_like(codes) if codes.grad is None else codes.grad
            team.add(grad)
            whole: int = mine.layer.n * mine.layer.k
            found[mine.path] += float(grad.abs().sum()) / whole
    return found

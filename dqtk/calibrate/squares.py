"""Mean squares of layer inputs, from replayed calls: K numbers per input, so one replay does for a whole model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.sites import Site

from .gather import MAX_ROWS, calls_of, check_finite, ends_of, input_name, rows_of
from .replay import Call, replay

Basis = Callable[[Tensor], Tensor]  # [..., K] -> [..., K]


def mean_squares(module: nn.Module, calls: Sequence[Call], wanted: Mapping[Any, tuple[Site, Basis]]) -> dict[Any, Tensor]:
    """float32 [K] by key: mean over rows of the squares of the numbers of a site's input, in a basis that is asked for.

    Rows are taken as ``gather`` takes them: at most ``MAX_ROWS`` of every call. Of sites that share an input one is watched.

    Raises:
        ValueError: no calls, a site that no call reaches, or NaN and infinities (names the site and the noise level).
    """
    first: dict[str, Site] = {}
    keys: dict[str, list[Any]] = {}
    for key, (site, _) in wanted.items():
        first.setdefault(input_name(site), site)
        keys.setdefault(input_name(site), []).append(key)
    if not first:
        return {}
    sums: dict[Any, Tensor] = {}
    count, seen = dict.fromkeys(first, 0), dict.fromkeys(first, 0)

    def watch(name: str, site: Site) -> Callable[[Tensor, Call], None]:
        layer: Any = module.get_submodule(site.path)

        def see(x: Tensor, call: Call) -> None:
            if not x.numel():
                return
            check_finite(site, ends_of(layer, x), call)
            rows = rows_of(layer, x, MAX_ROWS, torch.Generator().manual_seed(seen[name]))
            count[name], seen[name] = count[name] + len(rows), seen[name] + 1
            for key in keys[name]:
                found = wanted[key][1](rows).square().sum(dim=0).double()
                sums[key] = sums[key] + found if key in sums else found

        return see

    mine = calls_of(calls, next(iter(first.values())).component)
    replay(module, mine, {site.path: watch(name, site) for name, site in first.items()})
    for name, site in first.items():
        if not count[name]:
            raise ValueError(
                f"calibrate: {site.id} must be given numbers to learn from, got empty inputs only. Keep it at 16 bits."
            )
    return {key: (total / count[input_name(wanted[key][0])]).float() for key, total in sums.items()}

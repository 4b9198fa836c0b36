"""Parts of a run, from most noise to least: scores and precisions of their own.

A layer with one stored weight may multiply wider inputs where the noise level asks for it (``spec.ByLevel``). What a part of a run
loses by a spec is known from the scores of its calls, and losses of parts add up: so every mixture of a site's specs that share a
weight is one more candidate of the program.
"""

import itertools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dqtk.calibrate.schedule import run_times, time_at
from dqtk.spec import ByLevel, LayerSpec

MOST = 4  # parts: a weight's candidates are the number of its inputs to this power


@dataclass(frozen=True, kw_only=True, slots=True)
class RunParts:
    """Equal parts of a run. edges: between them, ascending, in the denoiser's own time. rising: as of ``ByLevel``."""

    edges: tuple[float, ...]
    rising: bool

    @staticmethod
    def of_run(num: int, pipe: Any, prompts: Sequence[str] | None, call_kwargs: Mapping[str, Any] | None) -> "RunParts":
        """Raises ``ValueError`` for more parts than steps, and what ``run_times`` raises."""
        times = run_times(pipe, prompts, call_kwargs)
        if len(times) < num:
            raise ValueError(f"allocate: parts must be at most the steps of a run, {len(times)}, got {num}. Take more steps.")
        edges = [time_at(times, i / num) for i in range(1, num)]
        return RunParts(edges=tuple(sorted(edges)), rising=times[-1] > times[0])

    def __len__(self) -> int:
        return len(self.edges) + 1

    def of(self, time: float) -> int:
        """The part, in the order of the run, that a call with this time lies in."""
        place = bisect_right(self.edges, time)
        return place if self.rising else len(self.edges) - place


def mixtures(specs: Sequence[LayerSpec], num: int) -> list[ByLevel]:
    """Every way to give the ``num`` equal parts of a run specs with the same stored weight; none where it is one spec throughout.

    At most one of them may have a calibrated input, and none a transform that is looked for: ``ByLevel`` takes no others.
    """
    found = []
    for weight in dict.fromkeys(replace(spec, input=None) for spec in specs):
        mine = [spec for spec in specs if replace(spec, input=None) == weight and not spec.looks and not spec.correct_bias]
        for parts in itertools.product(mine, repeat=num):
            if len(set(parts)) == 1 or len({spec for spec in parts if spec.needs_ranges}) > 1:
                continue
            cuts = [i for i in range(1, num) if parts[i - 1] != parts[i]]
            found.append(ByLevel(specs=(parts[0], *(parts[i] for i in cuts)), shares=tuple(i / num for i in cuts)))
    return found


def spec_in(spec: ByLevel, part: int, num: int) -> LayerSpec:
    """The spec that serves one of ``num`` equal parts."""
    return spec.specs[bisect_right(spec.shares, (part + 0.5) / num)]

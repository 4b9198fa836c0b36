"""Whole plans, judged. Layers alone say little about a model in which all are quantized: their errors do not simply add up.

The layer of every (site, spec) is made once; a plan is then a matter of putting layers in, judging, and taking them out.
Judgements are in a journal on the disk: a search that asks for the same plans again, in the same order, goes on where it was.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dqtk.calibrate import Stats
from dqtk.calibrate.replay import Call, made
from dqtk.checkpoint import replace_layer
from dqtk.journal import Journal, claim, done
from dqtk.nn.correction import output_of
from dqtk.plan import Choice, Plan
from dqtk.quantize import MAX_MEMORY, runtime_layer
from dqtk.spec import SiteSpec, canonical
from dqtk.stages import solutions

from .probes import PictureScore, noise

Picked = Mapping[str, SiteSpec | None]  # site id -> what it becomes


class Layers:
    """Runtime layers of the specs of some plans. They take as many bytes as the plans store together."""

    def __init__(self, parts: Mapping[str, nn.Module]):
        """parts: components by name, unquantized."""
        self.parts = parts
        self.made: dict[tuple[str, str], nn.Module] = {}

    def complete(
        self,
        plans: Sequence[Plan],
        stats: Stats | None,
        max_memory: int = MAX_MEMORY,
        told: Callable[[str], object] = lambda site: None,
    ) -> None:
        """Make those of the plans that are missing. ``told`` hears of every site."""
        for plan in plans:
            work = [c for c in plan.choices if c.spec is not None and (c.site.id, canonical(c.spec)) not in self.made]
            for solved in solutions(self.parts, work, stats, sequential=False, max_memory=max_memory):
                for choice, solution in solved:
                    self.add(choice, runtime_layer(self._now(choice.site.id), solution))
                    told(choice.site.id)

    def add(self, choice: Choice, layer: nn.Module) -> None:
        """A layer that was made elsewhere."""
        self.made[choice.site.id, canonical(choice.spec)] = layer

    @contextmanager
    def put(self, picked: Picked) -> Iterator[None]:
        """While open, the model is quantized so."""
        before: list[tuple[str, nn.Module]] = []
        try:
            for site, spec in picked.items():
                if spec is not None:
                    before.append((site, self._now(site)))
                    self._replace(site, self.made[site, canonical(spec)])
            yield
        finally:
            for site, layer in reversed(before):
                self._replace(site, layer)

    def _now(self, site: str) -> nn.Module:
        component, _, path = site.partition(":")
        return self.parts[component].get_submodule(path)

    def _replace(self, site: str, layer: nn.Module) -> None:
        component, _, path = site.partition(":")
        replace_layer(self.parts[component], path, layer)


class Judge(Protocol):
    """name: as stored and shown. A callable with a limit: the loss of the model as it is now, less is better, or some number above
    the limit as soon as it is known to be above.
    """

    name: str

    def __call__(self, limit: float = math.inf) -> float:
        """The loss, or a number above the limit."""


class OutputNoise:
    """Power of the denoisers' error on kept calls, as the output's share; components add up.

    ``decibels`` of it is the score of ``OutputSQNR``.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        calls: Sequence[Call],
        name: str = "output noise",
        counts: Callable[[Call], float] | None = None,
    ):
        """parts: components as they are when all is 16 bits. counts: how much a call's noise does; None: all alike.

        Raises ``ValueError`` without calls.
        """
        self.name, self.parts = name, parts
        self.calls = [call for call in calls if call.component in parts]
        if not self.calls:
            raise ValueError("allocate: calls of a denoiser must have been kept, got none. Calibrate this pipeline.")
        self.share = {name: 1 / sum(call.component == name for call in self.calls) for name in {c.component for c in self.calls}}
        self.references = [self._output(call) for call in self.calls]
        self.counts = [1.0 if counts is None else counts(call) for call in self.calls]

    def __call__(self, limit: float = math.inf) -> float:
        total = 0.0
        for call, reference, count in zip(self.calls, self.references, self.counts, strict=True):
            more = count * self.share[call.component] * noise(self._output(call), reference)
            total += more if math.isfinite(more) else math.inf
            if total > limit:
                break
        return total

    def _output(self, call: Call) -> Tensor:
        (found,) = made(self.parts[call.component], [call])
        return output_of(found).detach().cpu()


class Pictures:
    """Loss of whole pictures, each against that of the original: a paired score with its sign turned where higher is better."""

    def __init__(self, score: PictureScore):
        self.score, self.name = score, score.name

    def __call__(self, limit: float = math.inf) -> float:
        return -self.score()


class Judged:
    """A function (picked, limit) -> loss of the whole model so quantized; each is judged once, also over several runs."""

    def __init__(self, layers: Layers, judge: Judge, folder: Path, task: Mapping[str, Any]):
        """folder: of the journal, new or that of the same task and judge. Raises ``ValueError`` for another's."""
        self.layers, self.judge, self.folder = layers, judge, folder
        claim(folder, {"verb": "allocate", "judge": judge.name, **task}, "allocate")
        self.rows = done(folder, "allocate")

    def __call__(self, picked: Picked, limit: float = math.inf) -> float:
        key = key_of(picked)
        row = self.rows.get(key)
        if row is None or (row["above"] is not None and limit > row["above"]):
            with self.layers.put(picked), torch.no_grad():
                loss = self.judge(limit)
            row = {"loss": loss, "above": limit if loss > limit else None}
            self.rows[key] = row
            with Journal(self.folder, 0) as journal:
                journal.record(key, row)
        return float(row["loss"])


def key_of(picked: Picked) -> str:
    """16 hex digits that tell what is put where."""
    text = json.dumps(sorted((site, canonical(spec)) for site, spec in picked.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def decibels(noise_power: float) -> float:
    """SQNR in dB of a noise power."""
    return -10 * math.log10(noise_power) if noise_power > 0 else math.inf

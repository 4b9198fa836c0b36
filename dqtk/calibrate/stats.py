"""What calibration saw, mergeable and small.

One entry per key (site, noise-level bucket, CFG branch): least and largest input value, absmax per input channel, number of rows.
Merging is min, max and addition, so statistics can be streamed, resumed and gathered from several processes in any order.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dqtk.checkpoint import digest

from .replay import Call, from_tensors, to_tensors

BRANCHES = ("all", "uncond", "cond")  # "all": calls that are not split by guidance
NO_LEVEL = -1  # bucket of modules that run once, such as text encoders


@dataclass(frozen=True, slots=True)
class Key:
    """Where a statistic belongs."""

    site: str
    bucket: int
    branch: str

    def __str__(self) -> str:
        return f"{self.site}|{self.bucket}|{self.branch}"

    @staticmethod
    def parse(text: str) -> "Key":
        site, bucket, branch = text.rsplit("|", 2)
        return Key(site, int(bucket), branch)


@dataclass(slots=True)
class InputStat:
    """``low``, ``high``: float32 scalars [1]. ``channel_absmax``: float32 [C_in]. ``count``: rows seen."""

    low: Tensor
    high: Tensor
    channel_absmax: Tensor
    count: int

    def merge(self, other: "InputStat") -> "InputStat":
        return InputStat(
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            torch.maximum(self.channel_absmax, other.channel_absmax),
            self.count + other.count,
        )


@dataclass(slots=True, repr=False)
class Stats:
    """Statistics of a pipeline. ``num_prompts`` prompts have been seen; ``num_buckets`` noise-level buckets divide [0, 1].

    ``run`` says what run they come from (see ``calibrate``); merged ones come from several and say nothing. ``calls`` are kept for
    solvers that learn from inputs (see ``replay``). ``times``: (denoiser, bucket) -> least and largest time it was given.
    """

    num_buckets: int = 20
    num_prompts: int = 0
    inputs: dict[Key, InputStat] = field(default_factory=dict)
    run: dict[str, str] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    times: dict[tuple[str, int], tuple[float, float]] = field(default_factory=dict)

    def __repr__(self) -> str:
        sites = len({key.site for key in self.inputs})
        calls = f", {len(self.calls)} calls" if self.calls else ""
        return f"Stats({self.num_prompts} prompts, {len(self.inputs)} entries of {sites} sites{calls})"

    def add(self, key: Key, seen: InputStat) -> None:
        """Merge one observation."""
        self.inputs[key] = self.inputs[key].merge(seen) if key in self.inputs else seen

    def saw(self, component: str, bucket: int, low: float, high: float) -> None:
        """A denoiser was called at times from ``low`` to ``high`` in this bucket."""
        least, most = self.times.get((component, bucket), (low, high))
        self.times[component, bucket] = min(least, low), max(most, high)

    def merge(self, other: "Stats") -> "Stats":
        """Both together. Raises ``ValueError`` when the bucket counts differ."""
        if self.num_buckets != other.num_buckets:
            raise ValueError(
                f"Stats.merge: num_buckets must be {self.num_buckets}, got {other.num_buckets}. Calibrate with equal buckets."
            )
        merged = Stats(self.num_buckets, self.num_prompts + other.num_prompts, dict(self.inputs))
        first = 1 + max((call.run for call in self.calls), default=-1)
        merged.calls = [*self.calls, *(replace(call, run=call.run + first) for call in other.calls)]
        for key, seen in other.inputs.items():
            merged.add(key, seen)
        merged.times = dict(self.times)
        for (component, bucket), span in other.times.items():
            merged.saw(component, bucket, *span)
        return merged

    def of(self, site: str) -> Iterator[InputStat]:
        """All entries of a site."""
        return (seen for key, seen in self.inputs.items() if key.site == site)

    def input_range(self, site: str) -> tuple[Tensor, Tensor]:
        """Least and largest input of a site over levels and branches, float32 [1] each.

        Raises:
            ValueError: the site was never called, or saw NaN or infinity.
        """
        entries = list(self.of(site))
        if not entries:
            raise ValueError(
                f"Stats: {site} must have been called during calibration, got no statistics. Calibrate with this model and plan."
            )
        low, high = torch.stack([e.low for e in entries]).amin(0), torch.stack([e.high for e in entries]).amax(0)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise ValueError(
                f"Stats: inputs of {site} must be finite, got {float(low)} to {float(high)}. "
                "Calibrate in bfloat16 or float32, or keep the site at 16 bits."
            )
        return low, high

    def digest(self) -> str:
        """First 16 hex digits of SHA-256 over all numbers: tells statistics apart that say nothing of where they come from."""
        tensors, words = to_tensors(self.calls)
        for key, seen in self.inputs.items():
            tensors |= {f"{key}|low": seen.low, f"{key}|high": seen.high, f"{key}|channels": seen.channel_absmax}
        sha = hashlib.sha256(words.encode())
        for name in sorted(tensors):
            sha.update(f"{name}={digest(tensors[name])}".encode())
        return sha.hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write a safetensors file (temporary name, then rename)."""
        path = Path(path)
        tensors, counts = {}, {}
        for key, seen in self.inputs.items():
            name = str(key)
            tensors[f"{name}|range"] = torch.cat([seen.low.view(1), seen.high.view(1)])
            tensors[f"{name}|channel_absmax"] = seen.channel_absmax.contiguous()
            counts[name] = seen.count
        meta = {"num_buckets": str(self.num_buckets), "num_prompts": str(self.num_prompts), "counts": json.dumps(counts)}
        meta["run"] = json.dumps(self.run)
        meta["times"] = json.dumps([[*key, *span] for key, span in self.times.items()])
        kept, meta["calls"] = to_tensors(self.calls)
        tensors |= kept
        partial = path.with_name(f".{path.name}.partial")
        save_file(tensors, partial, metadata=meta)
        os.replace(partial, path)

    @staticmethod
    def load(path: str | Path) -> "Stats":
        """Inverse of ``save``.

        Raises:
            ValueError: a damaged file, or one of another kind.
        """
        try:
            with safe_open(path, framework="pt") as file:
                return Stats._read(file, path)
        except SafetensorError as error:
            raise ValueError(f"Stats.load: {path} must be a complete file, got: {error}. Remove it and calibrate again.") from error

    @staticmethod
    def _read(file: Any, path: str | Path) -> "Stats":
        meta = file.metadata() or {}
        if not {"counts", "run", "times"} <= set(meta):
            raise ValueError(
                f"Stats.load: {path} must be a file written by Stats.save of today, got metadata {sorted(meta)}. Calibrate again."
            )
        stats = Stats(int(meta["num_buckets"]), int(meta["num_prompts"]), run=json.loads(meta["run"]))
        for name, count in json.loads(meta["counts"]).items():
            low, high = file.get_tensor(f"{name}|range")
            stats.inputs[Key.parse(name)] = InputStat(low.view(1), high.view(1), file.get_tensor(f"{name}|channel_absmax"), count)
        stats.times = {(name, bucket): (low, high) for name, bucket, low, high in json.loads(meta.get("times", "[]"))}
        stats.calls = from_tensors(file.get_tensor, meta.get("calls", "[]"))
        return stats

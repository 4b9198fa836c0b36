"""Probes: how good a model is with one layer changed, paired with the model as it was. A probe is a callable with a name.

A metric of one's own is an object with these four things; ``measure`` takes one per group of sites (metric-decoupled
sensitivity, arXiv 2405.17873, section 4.2). All are paired: unpaired scores cannot tell single layers apart.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dqtk.calibrate.answers import outputs
from dqtk.calibrate.prefix import Prefix
from dqtk.calibrate.replay import Call
from dqtk.calls import by_frames, prompt_argument
from dqtk.quantize import MAX_MEMORY

from .parts import RunParts

_FRAMES = 32  # scored at a time, as by ``report.scores.values_of_frames``, which stands above this room
LARGEST = 144.5  # dB, 2^-48 of the signal's power: what float32 cannot tell from the signal


class Probe(Protocol):
    """name: as it is stored and shown. unit: of its scores. loss: a name of ``from_logs.LOSSES``, how scores of sites add up."""

    name: str
    unit: str
    loss: str

    def __call__(self, component: str, module: nn.Module | None = None) -> float:
        """Score of the model with this component as it is now, or with a module in its place; higher is better."""

    def floor(self, component: str) -> float | None:
        """Score of the unquantized component in another float dtype; None where nobody can say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What of a denoiser's output is scored. see: (module, call, output) -> tensor, linear in the output."""

    name: str
    see: Callable[[nn.Module, Call, Tensor], Tensor]


def _changes(module: nn.Module, call: Call, output: Tensor) -> Tensor:
    return by_frames(module, call.kwargs, output).diff(dim=1)


WHOLE = View(name="sqnr", see=lambda module, call, output: output)
CHANGES = View(name="difference_sqnr", see=_changes)
"""What a clip's latents change by from frame to frame: errors that all frames share are not counted."""
VIEWS = {view.name: view for view in (WHOLE, CHANGES)}


class OutputSQNR:
    """SQNR of the denoiser's output in dB, on kept calls, against the outputs of the same calls when this was made.

    -10 log10 of the mean over calls of sum (y_hat - y)^2 / sum y^2: every call, and so every noise level, counts alike (MixDQ's one
    sum over all calls would count by power). At most 144.5 dB.
    """

    unit, loss = "dB", "noise"

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        calls: Sequence[Call],
        run: RunParts | None = None,
        view: View = WHOLE,
        max_memory: int = MAX_MEMORY,
        beside: "OutputSQNR | None" = None,
    ):
        """parts: components by name. calls: as ``dqtk.calibrate`` keeps them. run: its parts, where ``in_parts`` is to be asked.
        view: what of the output. max_memory: bytes of each component's blocks' answers that may be kept, so that those in front of
        a changed layer are not computed again; 0 where other modules are scored (around a plan). beside: another view of the same
        calls, whose answers serve this one too.

        Raises ``ValueError`` for a component without calls, and for outputs that are not finite.
        """
        self.parts, self.calls, self.run, self.view, self.name = parts, calls, run, view, view.name
        if beside is None:
            self.prefixes: dict[str, Prefix] = {n: Prefix(part, self._of(n), max_memory) for n, part in parts.items()}
        else:
            self.prefixes = beside.prefixes
        self.references = {name: self._viewed(name, part, self.prefixes[name].exact) for name, part in parts.items()}
        for name, references in self.references.items():
            if not all(bool(torch.isfinite(y).all()) and bool(y.any()) for y in references):
                raise ValueError(f"allocate: outputs of {name} must be finite and not zero, got others. Load it in float32.")

    def __call__(self, component: str, module: nn.Module | None = None) -> float:
        return self._score(self._ratios(component, module))

    def in_parts(self, component: str, module: nn.Module | None = None) -> tuple[float, tuple[float, ...]]:
        """The score, and what each part of a run adds to the mean noise that it is made of; infinite where a layer overflows."""
        assert self.run is not None
        ratios, noises = self._ratios(component, module), [0.0] * len(self.run)
        for call, ratio in zip(self._of(component), ratios, strict=True):
            noises[self.run.of(call.time or 0.0)] += ratio / len(ratios)
        return self._score(ratios), tuple(noises)

    def floor(self, component: str) -> float | None:
        """Of the component in bfloat16, but for what its class keeps in float32, or in float32 if it is in 16 bits. Takes memory
        for a copy."""
        module = self.parts[component]
        dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
        other, kept = (torch.bfloat16, _kept_wide(module)) if dtype == torch.float32 else (torch.float32, set())
        twin = copy.deepcopy(module)
        for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
            if tensor.is_floating_point() and not kept.intersection(name.split(".")):
                tensor.data = tensor.data.to(other)
        return self._score(self._ratios(component, twin))

    def _of(self, component: str) -> list[Call]:
        mine = [call for call in self.calls if call.component == component]
        if not mine:
            raise ValueError(f"allocate: calls of {component} must have been kept, got none. Calibrate this pipeline.")
        return mine

    def _ratios(self, component: str, module: nn.Module | None) -> list[float]:
        """Noise power of every call, as its output's share."""
        found = self._outputs(component, self.parts[component] if module is None else module)
        ratios = [noise(y_hat, y) for y_hat, y in zip(found, self.references[component], strict=True)]
        return [ratio if math.isfinite(ratio) else math.inf for ratio in ratios]

    def _outputs(self, component: str, module: nn.Module) -> list[Tensor]:
        own = module is self.parts[component]
        found = self.prefixes[component].outputs() if own else outputs(module, self._of(component))
        return self._viewed(component, module, found)

    def _viewed(self, component: str, module: nn.Module, found: Sequence[Tensor]) -> list[Tensor]:
        return [self.view.see(module, call, y) for call, y in zip(self._of(component), found, strict=True)]

    def _score(self, ratios: Sequence[float]) -> float:
        return limited(math.fsum(ratios) / len(ratios))


def _kept_wide(module: nn.Module) -> set[str]:
    """Names of parts that diffusers leaves in float32 whatever dtype a model is loaded in."""
    return set(getattr(module, "_keep_in_fp32_modules", None) or ())


def limited(noise_power: float) -> float:
    """SQNR in dB, between -``LARGEST`` (a layer that overflows: as bad as can be) and ``LARGEST``."""
    if not math.isfinite(noise_power):
        return -LARGEST
    return max(-LARGEST, min(LARGEST, -10 * math.log10(noise_power))) if noise_power > 0 else LARGEST


class PictureScore:
    """Mean score of pictures or clips, each against that of the same prompt and seed when this was made. Whole pipeline runs:
    slow.

    MixDQ's metric of content is such a one: SSIM on 32 prompts. A sum of scores is made as large as possible; of scores in dB, a
    sum of noise powers as small. A score of pictures is of every frame of a clip.
    """

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str],
        score: Any,
        *,
        seed: int,
        batch_size: int,
        call_kwargs: Mapping[str, Any] | None,
        beside: "PictureScore | None" = None,
    ):
        """score: name, unit, higher_is_better, cap, clips and ``load() -> function``, as ``dqtk.metrics.score.PairScore`` has them.
        beside: another score of the same run of this pipeline, whose pictures of the original serve this one too.

        Raises ``ValueError`` for a score of clips and a pipeline of pictures.
        """
        self.pipe, self.prompts, self.seed, self.batch_size = pipe, list(prompts), seed, batch_size
        self.call_kwargs = dict(call_kwargs or {})
        self.score, self.function, self.unit = score, score.load(), score.unit
        self.loss = "noise" if score.unit == "dB" and score.higher_is_better else "score"
        self.references: list[Tensor] = self._pictures() if beside is None else beside.references
        clips = self.references[0].ndim == 5
        self.whole = bool(getattr(score, "clips", False))
        if self.whole and not clips:
            raise ValueError(
                f"allocate: {score.name} must be asked of a video pipeline, got one of pictures. "
                "Take a score of pictures, such as ssim."
            )
        self.name = f"{score.name} of {len(self.prompts)} {'clips' if clips else 'pictures'}"

    def __call__(self, component: str = "", module: nn.Module | None = None) -> float:
        if module is not None and module is not self.pipe.components[component]:
            raise ValueError("allocate: pictures must be those of the pipeline's own modules, got another. Score them around none.")
        pairs = zip(self._pictures(), self.references, strict=True)
        values = torch.cat([self._scores(found, reference) for found, reference in pairs]).double()
        values = values if self.score.cap is None else values.clamp(max=self.score.cap)
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"allocate: {self.name} must be finite, got {values.tolist()}. Take another score.")
        return float(values.mean()) * (1 if self.score.higher_is_better else -1)

    def floor(self, component: str) -> float | None:
        """None: another dtype moves whole pictures along their trajectory; ``dqtk compare --floor`` shows how far."""
        return None

    def _scores(self, found: Tensor, reference: Tensor) -> Tensor:
        if reference.ndim != 5 or self.whole:
            return self.function(found, reference)
        chunks = zip(*(clips.flatten(0, 1).split(_FRAMES) for clips in (found, reference)), strict=True)
        return torch.cat([self.function(mine, theirs) for mine, theirs in chunks])

    @torch.no_grad()
    def _pictures(self) -> list[Tensor]:
        """Batches of float32 pictures [B, 3, H, W] or clips [B, F, 3, H, W] in [0, 1]."""
        found = []
        for start in range(0, len(self.prompts), self.batch_size):
            prompts = self.prompts[start : start + self.batch_size]
            generators = [torch.Generator().manual_seed(self.seed + start + i) for i in range(len(prompts))]
            how = self.call_kwargs | {"generator": generators, "output_type": "pt"}
            made = self.pipe(**prompt_argument(self.pipe, prompts, "allocate"), **how)
            pixels = made.frames if hasattr(made, "frames") else made.images
            pixels = torch.stack(list(pixels)) if isinstance(pixels, list | tuple) else pixels
            found.append(pixels.float().clamp(0, 1).cpu())
        return found


def noise(approximation: Tensor, reference: Tensor) -> float:
    """Power of the error, as the reference's share."""
    y = reference.double()
    return float((approximation.double() - y).square().sum() / y.square().sum())

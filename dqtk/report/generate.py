"""Images or clips of two pipelines that differ in nothing but their weights: same prompt, same starting noise, same settings.

Each image has a generator of its own, on the CPU, seeded from (seed, prompt index, repetition). So an image does not depend on
the batch it was made in, on its neighbours, or on the device; ``Row.seed`` alone reproduces it. Samplers that draw noise
without being given the generators (a few ignore them) draw from torch's global one, which is seeded per batch and restored
afterwards.

A model that computes NaN paints black squares, and one that overflows white ones: pixels are clamped and cast without a word, and
the scores of such pictures are numbers like any other. So what the VAE decodes is checked, before and after it, and is an error
(``NotFinite``). The pictures themselves stay the pipeline's own, bit by bit.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dqtk.calls import RESERVED, denoisers, prompt_argument


class NotFinite(ValueError):
    """A pipeline computed NaN or infinity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One image to make: the ``prompt_index``-th prompt, its ``repetition``-th seed."""

    prompt_index: int
    repetition: int
    prompt: str
    seed: int

    @property
    def id(self) -> str:
        return f"{self.prompt_index:04d}-{self.repetition}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One 8-bit RGB picture, alone or of a clip, and what it was made for."""

    name: str
    task: Task
    image: Image.Image


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one call made: the frames of each clip (a picture has one), all 8-bit RGB; and the wall time in seconds that it took,
    decoding and conversion to pixels included."""

    clips: tuple[tuple[Image.Image, ...], ...]
    seconds: float

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The pictures. Raises ``ValueError`` for clips: one frame of a clip is not what the pipeline made."""
        longest = max(len(frames) for frames in self.clips)
        if longest > 1:
            raise ValueError(f"generate: the pipeline must make pictures here, got clips of {longest} frames. Read their clips.")
        return tuple(frames[0] for frames in self.clips)


def image_seed(seed: int, prompt_index: int, repetition: int = 0) -> int:
    """The 32-bit seed of one image: the first bytes of SHA-256 of the three numbers, so that neighbours share nothing."""
    digest = hashlib.sha256(f"{seed}:{prompt_index}:{repetition}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def make_tasks(prompts: Sequence[str], seed: int, seeds_per_prompt: int) -> list[Task]:
    """Every image of a comparison, prompt by prompt."""
    return [
        Task(prompt_index=i, repetition=r, prompt=prompt, seed=image_seed(seed, i, r))
        for i, prompt in enumerate(prompts)
        for r in range(seeds_per_prompt)
    ]


def check_call_kwargs(call_kwargs: Mapping[str, Any] | None, where: str = "compare: call_kwargs") -> dict[str, Any]:
    """What is passed on to the pipeline. Raises ``ValueError`` for what the comparison decides itself, and for latent output."""
    kwargs = dict(call_kwargs or {})
    taken = sorted(set(kwargs) & set(RESERVED))
    if taken:
        raise ValueError(f"{where} must be free of {list(RESERVED)}, got {taken}. These are set for each image.")
    if kwargs.pop("output_type", "pil") == "latent":
        raise ValueError(
            f"{where.split(':')[0]}: output_type must be an image type, got 'latent'. Leave it out; pictures are 8-bit pixels."
        )
    return kwargs


def generate(pipe: Any, tasks: Sequence[Task], call_kwargs: Mapping[str, Any]) -> Batch:
    """Make one batch of pictures or clips. They are what a user would save: 8-bit RGB, before any codec.

    Raises ``ValueError`` for a pipeline that takes no prompt, or returns neither pictures nor clips of one length per prompt;
    ``NotFinite`` for one that computes NaN or infinity.
    """
    output, seconds = _call(pipe, tasks, call_kwargs)
    clips = getattr(output, "frames", None)
    if clips is None:
        clips = [[image] for image in getattr(output, "images", ())]
    if len(clips) != len(tasks):
        raise ValueError(
            f"generate: the pipeline must return one picture or clip per prompt ({len(tasks)}), got {len(clips)}. "
            "Is it a pipeline from text to pictures or clips?"
        )
    lengths = sorted({len(frames) for frames in clips})
    if len(lengths) > 1 or lengths[0] == 0:
        raise ValueError(f"generate: clips must be of one number of frames, got {lengths}. Pass num_frames.")
    return Batch(clips=tuple(tuple(frame.convert("RGB") for frame in frames) for frames in clips), seconds=seconds)


def generate_frames(pipe: Any, tasks: Sequence[Task], call_kwargs: Mapping[str, Any]) -> list[Frame]:
    """Make one batch of pictures or clips. A picture's name is its task's id, a frame's that of ``frame_names``.

    Raises as ``generate`` does.
    """
    made = []
    for task, frames in zip(tasks, generate(pipe, tasks, call_kwargs).clips, strict=True):
        names = frame_names(task.id, len(frames))
        made += [Frame(name=name, task=task, image=frame) for name, frame in zip(names, frames, strict=True)]
    return made


def frame_names(name: str, num: int) -> list[str]:
    """Names of a clip's frames, ``NAME-00``, ``NAME-01``, and so on, as wide as the last needs; of a picture its own."""
    width = max(2, len(str(num - 1)))
    return [name] if num == 1 else [f"{name}-{number:0{width}d}" for number in range(num)]


def _call(pipe: Any, tasks: Sequence[Task], call_kwargs: Mapping[str, Any]) -> tuple[Any, float]:
    """What the pipeline returns for these prompts and seeds, checked to be finite, and the seconds that it took."""
    generators = [torch.Generator("cpu").manual_seed(task.seed) for task in tasks]
    inputs = prompt_argument(pipe, [task.prompt for task in tasks], "prompts")
    device = getattr(pipe, "_execution_device", torch.device("cpu"))
    with (
        _quiet(pipe),
        _global_noise(device, tasks[0].seed),
        torch.no_grad(),
        _watched(pipe) as finite,
        np.errstate(invalid="ignore"),
    ):
        start = time.perf_counter()
        output = pipe(**inputs, **call_kwargs, generator=generators, output_type="pil")
        seconds = time.perf_counter() - start
    _check_finite(tasks, finite)
    return output, seconds


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """8-bit RGB images of one size -> float32 [B, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255


@contextmanager
def _watched(pipe: Any) -> Iterator[list[Tensor]]:
    """Inside: whether what becomes pixels is finite, bool tensors per call of ``vae.decode`` ([B]; its input counts too), or
    without one of the denoiser's last call ([1]). On the device: nothing waits for them."""
    found: list[Tensor] = []
    vae: Any = getattr(pipe, "vae", None)
    if not hasattr(vae, "decode"):
        handles = [
            module.register_forward_hook(
                lambda module, inputs, output: found.__setitem__(slice(None), [_finite(output).all()[None]])
            )
            for module in denoisers(pipe).values()
        ]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()
        return
    own, decode = vars(vae).get("decode"), vae.decode

    def watched(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = decode(z, *args, **kwargs)
        before, after = _finite(z), _finite(output)
        found.append(before & after if len(before) == len(after) else (before.all() & after.all())[None])
        return output

    vae.decode = watched
    try:
        yield found
    finally:
        if own is None:
            del vae.decode
        else:
            vae.decode = own


def _finite(output: Any) -> Tensor:
    """Per row of a model's output (a tensor, or one in ``sample`` or first in a tuple)."""
    tensor = output if isinstance(output, Tensor) else getattr(output, "sample", None)
    tensor = output[0] if tensor is None else tensor
    return tensor.isfinite().flatten(1).all(dim=1)


def _check_finite(tasks: Sequence[Task], found: Sequence[Tensor]) -> None:
    flags = torch.cat([flag.cpu() for flag in found]) if found else torch.ones(1, dtype=torch.bool)
    if flags.all():
        return
    where = f"some of {len(tasks)}"
    if len(flags) == len(tasks):
        task = tasks[int(flags.logical_not().nonzero()[0])]
        where = f"{int((~flags).sum())} of {len(tasks)}, first in {task.id} ({task.prompt!r:.60})"
    raise NotFinite(
        f"generate: pictures must be finite before they become pixels, got NaN or infinity in {where}. The model overflows or is "
        "damaged: try bfloat16 or float32, or keep more of it at 16 bits."
    )


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Switch the pipeline's own progress bar off; put its setting back afterwards."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before


@contextmanager
def _global_noise(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's global generators inside, restore them outside."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield

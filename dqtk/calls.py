"""How pipelines and their denoisers are called: prompts or class labels, arguments a family needs, the time of a denoiser call."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .numerics.layout import Layout
from .resolve import adapters, call_kwargs_for
from .sites import DENOISERS
from .spec import did_you_mean

RESERVED = (
    "prompt",
    "class_labels",
    "generator",
    "num_images_per_prompt",
    "latents",
    "return_dict",
    "batch_size",
)  # set for each picture
TIME_NAMES = ("timestep", "timesteps", "t")
FRAME_NAMES = ("num_frames", "video_length")
_CHANNELS = ("in_channels", "out_channels", "in_dim", "out_dim")


def call_arguments(pipe: Any, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the pipeline's family needs, under what the caller gave."""
    return call_kwargs_for(pipe) | dict(given or {})


def check_call_names(pipe: Any, call_kwargs: Mapping[str, Any], where: str) -> None:
    """Raises ``ValueError`` for what ``__call__`` of a pipeline (or its class) does not name: many swallow ``**kwargs``, and a
    misspelt number of steps with them. A pipeline that passes them on to another's ``__call__`` takes what that names, and one that
    names nothing at all takes anything."""
    kind = pipe if isinstance(pipe, type) else type(pipe)
    known = _named(kind)
    allowed = [name for name in known if name not in RESERVED]
    for name in call_kwargs if known else ():
        if name not in known:
            hint = did_you_mean(name, allowed) or " Remove it."
            raise ValueError(f"{where} must be arguments of {kind.__name__} ({', '.join(allowed)}), got {name!r}.{hint}")


def _named(kind: type) -> dict[str, None]:
    """What ``__call__`` of a class and of those that it is made of name."""
    calls = [vars(base)["__call__"] for base in kind.__mro__ if "__call__" in vars(base)]
    parameters = [p for call in calls for p in inspect.signature(call).parameters.values()]
    return dict.fromkeys(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "self")


def check_prompts(prompts: Sequence[str], where: str, remedy: str = "Pass a list of texts.") -> None:
    """Raises ``ValueError`` for no prompts, and for one text, whose letters would be taken for prompts."""
    if isinstance(prompts, str):
        raise ValueError(f"{where}: prompts must be a list of texts, got one text {prompts!r}. Put it in a list.")
    if not prompts:
        raise ValueError(f"{where}: prompts must hold at least one prompt, got none. {remedy}")


def prompt_argument(pipe: Any, prompts: Sequence[str], where: str) -> dict[str, Any]:
    """``{"prompt": [...]}``, or ``{"class_labels": [...]}`` for a class-conditional pipeline (numbers or label names).

    Raises:
        ValueError: a pipeline that takes neither, or an unknown label.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    if "prompt" in parameters:
        return {"prompt": list(prompts)}
    if "class_labels" in parameters:
        return {"class_labels": [_class_label(pipe, prompt, where) for prompt in prompts]}
    raise ValueError(
        f"{where}: the pipeline must take 'prompt' or 'class_labels', got {type(pipe).__name__} with {sorted(parameters)}. "
        "Unconditional pipelines are not supported yet."
    )


def final_latents(pipe: Any, prompts: Sequence[str], seed: int, call_kwargs: Mapping[str, Any] | None, where: str) -> Tensor:
    """float32 [P, ...] on the CPU, of one run with all prompts in a batch; prompt i starts from generator seed + i.

    Raises ``ValueError`` as ``prompt_argument``, and for arguments that the pipeline does not name.
    """
    kwargs = call_arguments(pipe, call_kwargs)
    check_call_names(pipe, kwargs, f"{where}: call_kwargs")
    kwargs |= {"output_type": "latent", "return_dict": False}
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    return pipe(**prompt_argument(pipe, prompts, where), generator=generators, **kwargs)[0].float().cpu()


def makes_clips(pipe: Any) -> bool:
    """Whether it is a video pipeline, or the class of one: it can be asked for a number of frames."""
    named = _named(pipe if isinstance(pipe, type) else type(pipe))
    return any(name in named for name in FRAME_NAMES)


def _class_label(pipe: Any, prompt: str, where: str) -> int:
    if prompt.strip().isdigit():
        return int(prompt)
    labels = getattr(pipe, "labels", None) or {}
    if prompt not in labels:
        raise ValueError(f"{where}: a class-conditional prompt must be a number or a known label, got {prompt!r}. Use '0', '1', ….")
    return int(labels[prompt])


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's denoising components by name: ``unet``, ``transformer``, and numbered ones such as ``transformer_2``."""
    return {name: part for name, part in pipe.components.items() if DENOISERS.fullmatch(name) and isinstance(part, nn.Module)}


def given_arguments(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, those given by position first."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def latents_of(module: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """What a call of a denoiser denoises: its first parameter, wherever the caller names it. A tensor [B, ...] or B tensors."""
    first = list(inspect.signature(type(module).forward).parameters)[1:2]
    return next((arguments[name] for name in first if name in arguments), next(iter(arguments.values()), None))


def time_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """The time that a denoiser was called with, as the caller gave it; None for one without time."""
    found = next((arguments[name] for name in TIME_NAMES if arguments.get(name) is not None), None)
    return None if found is None else torch.as_tensor(found)


LayoutRule = Callable[[nn.Module, Mapping[str, Any]], Sequence[tuple[int, ...]]]


def layout_rule(module: nn.Module) -> LayoutRule:
    """How this denoiser's calls tell the sequences that attend to themselves: as its family's adapter says, which knows where text
    stands; else latents are [B, C, H, W] or [B, C, F, H, W], cut into patches."""
    adapter = adapters().get(type(module).__name__)
    return _of_latents if adapter is None or adapter.layouts is None else adapter.layouts


def layouts_of(module: nn.Module, arguments: Mapping[str, Any], rule: LayoutRule | None = None) -> dict[int, Layout]:
    """Number of tokens -> layout, of the sequences that attend to themselves in this call of a denoiser.

    Raises:
        ValueError: latents of a shape that the rule does not know, or two sequences as long as each other that are not alike.
    """
    found: dict[int, Layout] = {}
    for numbers in (rule or layout_rule(module))(module, arguments):
        layout = Layout(*numbers)
        other = found.setdefault(layout.tokens, layout)
        if other != layout:
            raise ValueError(
                f"attention: sequences of {layout.tokens} tokens in one call of {type(module).__name__} must have one layout "
                f"(frames, rows, columns, text before and after), got {other.numbers} and {layout.numbers}: by their length they "
                "cannot be told apart. Take another resolution, or another number of text tokens."
            )
    return found


def by_frames(module: nn.Module, arguments: Mapping[str, Any], latents: Tensor) -> Tensor:
    """Latents of a denoiser's call as [B, F, ...]: in the order that its family's adapter says; without one [B, C, F, H, W], where
    the channels are those of its configuration; or packed, [B, F * rows * columns, C].

    Raises ``ValueError`` where there are no frames, or nobody can say where they lie.
    """
    adapter = adapters().get(type(module).__name__)
    if latents.ndim == 5:
        if adapter is None:
            _check_channels(module, latents)
        return latents.movedim(2 if adapter is None else adapter.frame_dim, 1)
    frames = max(layout.frames for layout in layouts_of(module, arguments).values())
    if latents.ndim != 3 or frames < 2 or latents.shape[1] % frames:
        raise ValueError(
            f"frames: latents of {type(module).__name__} must be [B, C, F, H, W] or packed in frames, got {list(latents.shape)}. "
            "Pictures have none."
        )
    return latents.unflatten(1, (frames, -1))


def _check_channels(module: nn.Module, latents: Tensor) -> None:
    """Raises ``ValueError`` unless the second dimension alone, and not the third, can be the channels."""
    config = getattr(module, "config", None)
    known = {name: value for name in _CHANNELS if (value := getattr(config, name, None)) is not None}
    if latents.shape[1] not in known.values() or latents.shape[2] in known.values():
        listed = ", ".join(f"{name} {value}" for name, value in known.items()) or "none in its configuration"
        raise ValueError(
            f"frames: latents of {type(module).__name__} must be [B, C, F, H, W] with its channels C ({listed}) and another F, got "
            f"{list(latents.shape)}. Its family needs an adapter that says where frames lie (Adapter.frame_dim)."
        )


def _of_latents(module: nn.Module, arguments: Mapping[str, Any]) -> list[tuple[int, ...]]:
    latents = next((arguments[name] for name in ("hidden_states", "sample") if isinstance(arguments.get(name), Tensor)), None)
    if latents is None or latents.ndim not in (4, 5):
        shape = None if latents is None else tuple(latents.shape)
        raise ValueError(
            f"attention: latents of {type(module).__name__} must be [B, C, H, W] or [B, C, F, H, W], got {shape}. Its family needs "
            "an adapter that says where its tokens come from (docs/attention.md)."
        )
    patch = getattr(getattr(module, "config", None), "patch_size", None) or 1
    sizes = tuple(latents.shape[2:]) if latents.ndim == 5 else (1, *latents.shape[2:])
    each = tuple(patch) if isinstance(patch, list | tuple) else (1, patch, patch)
    return [tuple(size // cut for size, cut in zip(sizes, each, strict=True))]

"""Find the layers that depend on the noise level only, and replace them by tables for a schedule (``ModulationCache``).

TFMQ-DM (Huang et al. 2023, arXiv 2311.16503) treats such layers apart because their inputs are a finite set; its successor
(arXiv 2407.19547) caches their outputs. They are not known by names but probed: the denoiser is called with two prompts, at two
sizes and one time, and once more with other numbers in what comes by sample (guidance, sizes); a linear whose outputs are equal to
the bit in all rows of all depends on nothing else. So SDXL's, SD3's and Flux's modulation, which mix in pooled text, fail it beyond
the time embedding; PixArt's and Wan's pass. Those can have tables for some prompts: in another probe the second call gets the first
one's pooled text, and what else comes by sample.

With tables a layer is exact for the batch it was made with, and its weights can go. A quantized layer's table may be that of the
original layer: where what quantizing did to it is worth mending (``disturbances``; the successor's disturbance-aware selection).
"""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from dqtk.calibrate.replay import Call, arguments_for
from dqtk.calibrate.schedule import run_calls
from dqtk.calls import TIME_NAMES, check_prompts, denoisers
from dqtk.checkpoint import replace_layer
from dqtk.nn.modulation import KnownCalls, ModulationTable, conditions_in, nearest, samples_of


class _Enough(Exception):
    """All that was asked for has been seen."""


@torch.no_grad()
def temporal_layers(module: nn.Module, calls: Sequence[Call], later: float | None = None) -> list[str]:
    """Paths of linears whose outputs depend on the time of a call only, in the order in which a call reaches them.

    Args:
        module: denoiser.
        calls: at least two, of other prompts and sizes; they are made at the first one's time, and the first once more later.
        later: another time; None: half of the first one's, or 0.5 where that is 0.
    """
    first, others = _probed(module, [*calls, _disturbed(module, calls[-1])])
    again, _ = _probed(module, [at_time(calls[0], (calls[0].time or 1.0) / 2 if later is None else later)])
    return [
        path
        for path, mine in first.items()
        if all(_one_row(mine, other.get(path)) for other in others) and not _one_row(mine, again.get(path))
    ]


@torch.no_grad()
def conditioned_layers(module: nn.Module, calls: Sequence[Call]) -> list[str]:
    """The same for linears whose outputs depend, a row per sample, on the time and on what a call gives by sample
    (``nn.modulation.conditions_in``: pooled text, sizes, guidance), on either or both. Raises as ``conditioned_as``."""
    batch = len(next(iter(conditions_in(module, calls[0].kwargs).values()), ()))
    first, others = _probed(module, [calls[0], *(conditioned_as(module, calls[0], [call]) for call in calls[1:])])
    return [path for path, mine in first.items() if all(_row_by_sample(mine, other.get(path), batch) for other in others)]


def conditioned_as(module: nn.Module, one: Call, others: Sequence[Call]) -> Call:
    """The first of the others that gives as much by sample, with what ``one`` gives. Raises ``ValueError`` where none does."""
    mine = conditions_in(module, one.kwargs)
    for other in others:
        theirs = conditions_in(module, other.kwargs)
        if {name: tensor.shape for name, tensor in mine.items()} == {name: tensor.shape for name, tensor in theirs.items()}:
            return _exchanged(other, {id(theirs[name]): tensor for name, tensor in mine.items()})
    given = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in mine.items()) or "nothing"
    raise ValueError(
        f"modulation: calls of {type(module).__name__} must give the same by sample at both sizes, got {given} at the first alone. "
        "Give other_size=(height, width)."
    )


def _disturbed(module: nn.Module, call: Call) -> Call:
    """The call with other numbers in what it gives by sample; labels stay."""
    given = [tensor for tensor in conditions_in(module, call.kwargs).values() if tensor.is_floating_point()]
    return _exchanged(call, {id(tensor): tensor * 1.25 + 0.5 for tensor in given})


def _exchanged(call: Call, others: Mapping[int, Tensor]) -> Call:
    """The call with other tensors in place of these, by ``id``."""
    return replace(call, kwargs=tree_map(lambda value: others.get(id(value), value), call.kwargs))


def _probed(module: nn.Module, calls: Sequence[Call]) -> tuple[dict[str, list[Tensor]], list[dict[str, list[Tensor]]]]:
    """Outputs of all linears in the first call, and in the others, which are made at the first one's time."""
    time = calls[0].time
    if time is None:
        raise ValueError(f"modulation: {type(module).__name__} must be called with a time, got none. It has no noise levels.")
    linears = [path for path, layer in module.named_modules() if isinstance(layer, nn.Linear) and path]
    first, *others = (_outputs(module, at_time(call, time), linears) for call in calls)
    return first, others


def _one_row(mine: list[Tensor], theirs: list[Tensor] | None) -> bool:
    """Whether all rows of all calls are one row."""
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in [*mine, *(theirs or [])]]
    return theirs is not None and len(mine) == len(theirs) == 1 and all(bool((part == rows[0][0]).all()) for part in rows)


def _row_by_sample(mine: list[Tensor], theirs: list[Tensor] | None, batch: int) -> bool:
    """Whether both calls gave the same, a row per sample."""
    if theirs is None or len(mine) != 1 or len(theirs) != 1:
        return False
    return mine[0].shape[0] == mine[0].shape[:-1].numel() == batch and torch.equal(mine[0], theirs[0])


def _outputs(module: nn.Module, call: Call, paths: Sequence[str], enough: bool = False) -> dict[str, list[Tensor]]:
    """Outputs of linears in one call, in order; ``enough``: stop behind the last one."""
    found: dict[str, list[Tensor]] = {}
    left = set(paths)

    def hook(path: str) -> Any:
        def see(layer: nn.Module, args: tuple, output: Tensor) -> None:
            found.setdefault(path, []).append(output.detach().clone())
            left.discard(path)
            if enough and not left:
                raise _Enough

        return see

    with ExitStack() as hooks, suppress(_Enough):
        for path in paths:
            hooks.callback(module.get_submodule(path).register_forward_hook(hook(path)).remove)
        module(**arguments_for(module, call))
    return found


def at_time(call: Call, time: float) -> Call:
    """The call with another time, in the form in which it was given one."""
    name = next(name for name in TIME_NAMES if call.kwargs.get(name) is not None)
    given = call.kwargs[name]
    moved = torch.full_like(given, time) if isinstance(given, Tensor) else type(given)(time)
    return replace(call, kwargs={**call.kwargs, name: moved})


@dataclass(frozen=True, kw_only=True, slots=True)
class ModulationCache:
    """Tables in place of some layers of a denoiser. ``bytes_before``, ``bytes_after``: of those layers, and of their tables."""

    module: nn.Module = field(repr=False)
    paths: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    known: KnownCalls = field(repr=False)
    kept: Mapping[str, nn.Module] | None = field(repr=False)

    @property
    def bytes_saved(self) -> int:
        """Memory that the denoiser no longer takes, once the layers are evicted; may be negative."""
        return self.bytes_before - self.bytes_after

    def restore(self) -> None:
        """Put the layers back. Raises ``ValueError`` where they were evicted."""
        if self.kept is None:
            raise ValueError(
                "modulation: layers must have been kept to be restored, got evicted ones. "
                "Load the model again and cache with evict=False."
            )
        for path, layer in self.kept.items():
            rows = self.module.get_submodule(path).get_buffer("rows")  # where the model is by now, and in what dtype
            replace_layer(self.module, path, layer.to(rows) if type(layer) is nn.Linear else layer.to(rows.device))
        for key, hook in list(self.module._forward_pre_hooks.items()):
            if getattr(hook, "__self__", None) is self.known:
                del self.module._forward_pre_hooks[key]
                self.module._forward_pre_hooks_with_kwargs.pop(key, None)


@torch.no_grad()
def disturbances(
    original: nn.Module, quantized: nn.Module, call: Call, times: Sequence[float], paths: Sequence[str]
) -> dict[str, float]:
    """Path -> what quantizing did to the layer's output: power of the error over that of the output, both over all times; what
    the layers before it did to its input included."""
    errors, powers = dict.fromkeys(paths, 0.0), dict.fromkeys(paths, 0.0)
    for time in times:
        here = at_time(call, time)
        exact, got = (_outputs(module, here, paths, enough=True) for module in (original, quantized))
        for path in paths:
            y = exact[path][0].double().cpu()
            errors[path] += float((got[path][0].double().cpu() - y).square().sum())
            powers[path] += float(y.square().sum())
    return {path: errors[path] / powers[path] if powers[path] else float(errors[path] > 0) for path in paths}


@torch.no_grad()
def cache_modulation(
    module: nn.Module,
    calls: Sequence[Call],
    times: Sequence[float],
    paths: Sequence[str],
    *,
    per_prompt: bool = False,
    evict: bool = True,
    original: nn.Module | None = None,
) -> ModulationCache:
    """Replace layers by tables of their outputs.

    Args:
        module: denoiser, quantized or not.
        calls: any call of it, with the batch that it will have; ``per_prompt``: calls with all prompts that it will be given.
        times: of the schedule, in the denoiser's own time; of several schedules one behind the other.
        paths: as ``temporal_layers`` finds them, or (``per_prompt``) ``conditioned_layers``.
        per_prompt: a row for every sample that the calls give, found by its conditions, in place of one for all.
        evict: let go of the layers; else they are kept on the CPU for ``restore``.
        original: the denoiser whose outputs the tables hold; None: the module itself.
    Raises:
        ValueError: no layers, times or calls; layers that are tables; ``per_prompt`` and calls that do not give the same by sample.
    """
    if not paths or not times or not calls:
        raise ValueError(
            f"modulation: layers, times and calls must be given, got {len(paths)}, {len(times)} and {len(calls)}. "
            "No layer of this denoiser depends on the noise level only, or the schedule is empty."
        )
    if tables := [path for path in paths if isinstance(module.get_submodule(path), ModulationTable)]:
        raise ValueError(f"modulation: {tables[0]} must be a layer, got a table already. restore() first, or load the model again.")
    # As the denoiser is given them, in the dtype of the call.
    times = list(dict.fromkeys(at_time(calls[0], time).time or 0.0 for time in times))
    source = module if original is None else original
    mine = _outputs(module, at_time(calls[0], times[0]), paths, enough=True)  # where and in what dtype tables must be
    if per_prompt:
        rows, conditions = _by_sample(module, source, calls, times, paths)
    else:
        rows, conditions = _tabulated(source, calls[0], times, paths), {}
    known = KnownCalls(times, conditions)
    kept: dict[str, nn.Module] = {}
    before = after = 0
    for path in paths:
        table_rows = rows[path].to(mine[path][0])
        if bool((table_rows == table_rows[:, :1]).all()):
            table_rows = table_rows[:, :1]
        kept[path] = module.get_submodule(path)
        before += _bytes(kept[path])
        table = ModulationTable(table_rows, known, kept[path])  # type: ignore[arg-type]
        after += _bytes(table)
        replace_layer(module, path, table)
        kept[path] = kept[path] if evict else kept[path].cpu()
    module.register_forward_pre_hook(known.see, with_kwargs=True)
    return ModulationCache(
        module=module, paths=tuple(paths), bytes_before=before, bytes_after=after, known=known, kept=None if evict else kept
    )


def _tabulated(module: nn.Module, call: Call, times: Sequence[float], paths: Sequence[str]) -> dict[str, Tensor]:
    """Path -> outputs of a layer at these times, [S, B, N]."""
    by_time = [_outputs(module, at_time(call, time), paths, enough=True) for time in times]
    return {path: torch.stack([found[path][0].flatten(0, -2) for found in by_time]) for path in paths}


def _by_sample(
    module: nn.Module, source: nn.Module, calls: Sequence[Call], times: Sequence[float], paths: Sequence[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Path -> outputs of a layer, [C * S, 1, N], for the C samples of these calls whose conditions differ; and these conditions."""
    rows: dict[str, list[Tensor]] = {path: [] for path in paths}
    conditions: dict[str, Tensor] = {}
    for call in calls:
        samples = samples_of(module, arguments_for(module, call))
        if not samples or (conditions and samples.keys() != conditions.keys()):
            raise ValueError(
                f"modulation: per_prompt must come with calls that all give the same by sample, got {sorted(samples) or 'none'} of "
                f"{type(module).__name__}. Leave per_prompt out."
            )
        new = []
        for index in range(len(next(iter(samples.values())))):
            one = {name: tensor[index : index + 1] for name, tensor in samples.items()}
            if not conditions or nearest(one, conditions) == [None]:
                conditions = {name: torch.cat([conditions.get(name, tensor[:0]), tensor]) for name, tensor in one.items()}
                new.append(index)
        here = _tabulated(source, call, times, paths) if new else {}
        for path, index in product(paths, new):
            rows[path].append(here[path][:, index : index + 1])
    return {path: torch.cat(found) for path, found in rows.items()}, conditions


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def cache_pipeline(
    pipe: Any,
    prompts: Sequence[str],
    *,
    call_kwargs: Mapping[str, Any] | None = None,
    other_size: tuple[int, int] | None = None,
    per_prompt: bool = False,
    evict: bool = True,
    original: Any = None,
    above: float | None = None,
) -> dict[str, ModulationCache]:
    """Probe the denoisers of a pipeline and replace what depends on the noise level only, for the schedule of a call.

    A run is made in which every denoiser computes once per prompt, to see at which times it is called.

    Args:
        pipe: pipeline, quantized or not. Tables are made with batches of one prompt.
        prompts: two different ones; ``per_prompt``: all that it will be given, in batches of any of them.
        call_kwargs: as the pipeline will be called, number of steps included; ``per_prompt``: size, negative prompt and what else
            comes by sample too.
        other_size: height and width of the second call of the probe, with which tables are made; None: half of the first one's.
        per_prompt: replace also what depends on the prompt (or the size, guidance) beside the level: SDXL's, SD3's and Flux's
            modulation.
        evict: see ``cache_modulation``.
        original: the pipeline before it was quantized. Tables then hold its outputs, so these layers are exact again.
        above: with ``original``, only layers are replaced that quantizing disturbed more than this (``disturbances``: error power
            as the output's share, so 1e-4 is -40 dB; of the first prompt). None: all.
    Returns:
        Name of the denoiser -> what was done; a denoiser of which no layer qualifies is left out, and where none does, a
        ``UserWarning`` says so.
    Raises:
        ValueError: fewer than two prompts; ``above`` without ``original`` or less than 0; as ``cache_modulation``.
    """
    if above is not None and (original is None or not above >= 0):
        raise ValueError(
            f"modulation: above must be at least 0 and come with original, got {above} {'with' if original else 'without'} it. "
            "Pass the pipeline before it was quantized."
        )
    check_prompts(prompts, "modulation")
    if len(prompts) < 2 or prompts[0] == prompts[1]:
        raise ValueError(
            f"modulation: prompts must be two different ones, got {list(prompts)[:2]}. One tells nothing from the text."
        )
    if original is not None and not set(denoisers(pipe)) <= set(denoisers(original)):
        raise ValueError(
            f"modulation: original must have the denoisers {sorted(denoisers(pipe))}, got {sorted(denoisers(original))}. Pass both "
            "pipelines of one model."
        )
    runs = [run_calls(pipe, prompt, call_kwargs) for prompt in (prompts if per_prompt else prompts[:1])]
    size = other_size or tuple(_half(side) for side in _size(pipe, runs[0][0], call_kwargs or {}))
    others = run_calls(pipe, prompts[1], {**(call_kwargs or {}), "height": size[0], "width": size[1]})
    made = {}
    for name, module in denoisers(pipe).items():
        mine, theirs = ([call for call in calls if call.component == name] for calls in (chain(*runs), others))
        if not mine:
            continue
        if not theirs:
            raise ValueError(
                f"modulation: {name} must be called at both sizes, got no call at {size}. Give other_size=(height, width)."
            )
        exact = None if original is None else denoisers(original)[name]
        source = module if exact is None else exact
        times = list(dict.fromkeys(call.time for call in mine if call.time is not None))
        calls = [conditioned_as(source, call, theirs) for call in mine] if per_prompt else theirs[:1]
        if per_prompt:
            paths = conditioned_layers(source, [mine[0], calls[0]])
        else:
            paths = temporal_layers(source, [mine[0], theirs[0]], times[-1] if len(times) > 1 else None)
        if exact is not None and above is not None and paths:
            found = disturbances(exact, module, mine[0], times, paths)
            paths = [path for path in paths if not found[path] <= above]  # NaN: disturbed as much as can be
        if paths:
            made[name] = cache_modulation(module, calls, times, paths, per_prompt=per_prompt, evict=evict, original=exact)
    if not made:
        warnings.warn(
            f"modulation: no layer qualifies, so nothing became a table. {_remedy(pipe, per_prompt, above)}", stacklevel=2
        )
    return made


def _remedy(pipe: Any, per_prompt: bool, above: float | None) -> str:
    if any(isinstance(layer, ModulationTable) for part in denoisers(pipe).values() for layer in part.modules()):
        return "Some are tables already: restore() them first."
    if above is not None:
        return "Quantizing disturbed none of them more than above."
    return "The model has none." if per_prompt else "Where pooled text enters, give per_prompt=True."


def _half(side: int) -> int:
    """About half of a side in pixels, as denoisers that cut latents into patches can take it."""
    half = side // 2
    multiple = 32 if half >= 64 else 16 if half >= 16 else 1
    return half // multiple * multiple


def _size(pipe: Any, call: Call, call_kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width in pixels: those of ``call_kwargs``, or as latents [B, C, H, W] or [B, C, F, H, W] say."""
    if call_kwargs.get("height") and call_kwargs.get("width"):
        return call_kwargs["height"], call_kwargs["width"]
    latents = max((v for v in call.kwargs.values() if isinstance(v, Tensor) and v.ndim >= 4), key=lambda t: t.ndim, default=None)
    scale = getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", None)
    if latents is None or scale is None:
        raise ValueError(
            f"modulation: the size of {type(pipe).__name__} must be readable from its latents, got tokens. "
            "Give other_size=(height, width)."
        )
    return latents.shape[-2] * scale, latents.shape[-1] * scale

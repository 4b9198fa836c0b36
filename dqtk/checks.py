"""What can be wrong with a model, a plan and what ``quantize`` is asked to do, found before the first layer is touched.

First what needs no statistics, so that nobody pays for a calibration and is refused then; the rest when they are there.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import Stats
from .calibrate.gather import calls_of
from .calls import check_call_names, check_prompts
from .checkpoint import quantized_layers
from .fit import check_fit
from .nn import Quantized, books_of, runtime_class
from .plan import Choice, Plan
from .refine.refinable import check_learners, check_lessons
from .sites import DENOISERS, components_of
from .spec import ByLevel, Distill, Reconstruct, Refiner, describe, shared_forms

_HOST_HOOKS = ("_hf_hook", "_diffusers_hook")

# --- before calibration ----------------------------------------------------------------------------------------------


def check_asked(
    target: Any,
    plan: Plan,
    *,
    max_memory: int,
    correct: bool = False,
    refine: Refiner | None = None,
    sequential: bool = False,
    checkpoint: Path | None = None,
    world: int = 1,
    call_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Raises ``ValueError`` for arguments of ``quantize`` that cannot be, alone, together or with this model.

    world: processes that share the work. The other arguments are those of ``quantize``.
    """
    _check_learning(correct, refine)
    if max_memory <= 0:
        raise ValueError(f"quantize: max_memory must be a positive number of bytes, got {max_memory}. 2 GiB is 2 * 2**30.")
    if checkpoint is not None and refine is None and (sequential or not plan.needs_stats):
        what = "sequential, which is not kept" if sequential else f"recipe {plan.recipe}, which learns nothing from inputs"
        raise ValueError(
            f"quantize: checkpoint must be left out with {what}, got {str(checkpoint)!r}. There is nothing to go on from."
        )
    if world > 1 and (isinstance(refine, Reconstruct) or sequential):
        raise ValueError(
            "quantize: block reconstruction and sequential must be left to one process, got several. Share the layers first, with "
            "stats of calibrate(keep_calls=True); the same call in one process goes on from the checkpoint."
        )
    if refine is not None and any(isinstance(choice.spec, ByLevel) for choice in plan.choices):
        raise ValueError(
            "quantize: refine must be left out for a plan with a step policy, got one. Weights of some noise levels only do "
            "not learn yet."
        )
    if call_kwargs and not isinstance(target, nn.Module):
        check_call_names(target, call_kwargs, "quantize: call_kwargs")
    parts = components_of(target)
    check_fit(plan, parts)
    if correct or refine is not None:
        _check_taught(target, plan, "correct" if refine is None else "refine")
    if refine is not None:
        _check_learners(plan, parts, refine)


def _check_learning(correct: Any, refine: Any) -> None:
    """Whether they are of their types: a text or a class would be taken for a wish."""
    if not isinstance(correct, bool):
        raise ValueError(f"quantize: correct must be True or False, got {correct!r}. There is nothing to choose.")
    if refine is not None and not isinstance(refine, Refiner):
        write = f"{refine.__name__}()" if refine in (Distill, Reconstruct) else "Distill()"
        raise ValueError(
            f"quantize: refine must be a Distill, a Reconstruct or None, got {refine!r}. Write refine={write}, of dqtk.spec."
        )


def touched(plan: Plan) -> list[str]:
    """The components that a plan changes."""
    return list(dict.fromkeys(choice.site.component for choice in plan.decisions if choice.spec is not None))


def taught(plan: Plan) -> list[str]:
    """The denoisers among them: what ``correct`` and ``refine`` teach."""
    return [name for name in touched(plan) if DENOISERS.fullmatch(name)]


def _check_taught(target: Any, plan: Plan, what: str) -> None:
    if taught(plan):
        return
    got = f"{what} for a bare {type(target).__name__}" if isinstance(target, nn.Module) else f"{what} for {touched(plan)}"
    remedy = ". Pass the pipeline that it is part of" if isinstance(target, nn.Module) else ""
    raise ValueError(
        f"quantize: correct and refine must be left out where no denoiser of a pipeline is quantized, got {got}{remedy}, or leave "
        "it out."
    )


def batch_for(num_prompts: int, most: int, learns: bool) -> int:
    """Prompts of a calibration run: ``most``, or fewer where ``correct`` or ``refine`` would have one run, of which they hold out
    some."""
    return max(1, min(most, math.ceil(num_prompts / 2))) if learns else most


def check_runs(plan: Plan, prompts: Sequence[str], batch_size: int) -> None:
    """Raises ``ValueError`` where calibrating on these prompts would make fewer runs than ``correct`` and ``refine`` must have."""
    check_prompts(prompts, "calibrate", "Pass a list or a file with one prompt per line.")
    runs = math.ceil(len(prompts) / batch_size)
    if runs < 2 and taught(plan):
        got, smaller = "one prompt", ""
        if len(prompts) > 1:
            got = f"{len(prompts)} prompts in batches of {batch_size}"
            smaller = ", or a smaller batch (--batch-size; in Python stats=dqtk.calibrate(..., batch_size=..., keep_calls=True))"
        raise ValueError(
            f"quantize: correct and refine must have calls of at least two calibration runs of {', '.join(taught(plan))}, got "
            f"{runs}: {got}. Give more prompts{smaller}."
        )


def _check_learners(plan: Plan, parts: Mapping[str, nn.Module], refine: Refiner) -> None:
    """Raises ``ValueError`` for a refiner that asks of layers what they cannot do; it is known before calibration."""
    for name in dict.fromkeys(choice.site.component for choice in plan.choices):
        planned = {choice.site.path: choice.spec for choice in plan.of(name).choices if choice.spec is not None}
        if planned and DENOISERS.fullmatch(name):
            there = {path: layer.spec for path, layer in quantized_layers(parts[name]).items()}
            check_learners(name, parts[name], refine, there | planned, planned)


# --- before a layer is touched ----------------------------------------------------------------------------------------


def check_kept_calls(students: Mapping[str, nn.Module], work: Sequence[Choice], stats: Stats, refine: Refiner) -> None:
    """Raises ``ValueError`` for a refiner that kept calls do not serve."""
    for name, part in students.items():
        planned = [choice.site.path for choice in work if choice.site.component == name]
        there = () if isinstance(refine, Reconstruct) else quantized_layers(part)
        check_lessons(name, part, refine, {*there, *planned}, calls_of(stats.calls, name))


def check_free_group(module: nn.Module, choice: Choice) -> None:
    """Raises ``ValueError`` where shared books of an earlier call have the name of those to come: layers read them."""
    there = books_of(module)
    taken = next((form for form in shared_forms(choice.spec) if there is not None and form.group in there.groups()), None)
    if taken is not None:
        raise ValueError(
            f"quantize: {choice.site.id} must share books under a new name, got {taken.group!r}, which layers quantized before "
            "read. Choose another group."
        )


def check_layer(layer: Any, choice: Choice, stats: Stats | None) -> None:
    """Raises ``ValueError`` for a layer that cannot be quantized as chosen, or whose statistics are missing."""
    site, weight = choice.site.id, layer.weight
    if isinstance(layer, Quantized):
        raise ValueError(f"quantize: {site} must be unquantized, got {describe(layer.spec)} already. Load the original model.")
    if choice.spec is not None and choice.spec.needs_ranges and stats is not None:
        stats.input_range(site)  # raises when it was never called
    if choice.spec is not None and choice.spec.needs_inputs and stats is not None:
        calls_of(stats.calls, choice.site.component)  # raises when none were kept
    if weight.device.type == "meta":
        raise ValueError(
            f"quantize: {site} must have real weights, got a meta tensor. Load the model with from_pretrained; offload afterwards."
        )
    hooked = layer._forward_hooks or layer._forward_pre_hooks or any(name in vars(layer) for name in _HOST_HOOKS)
    if hooked:
        raise ValueError(
            f"quantize: {site} must have no hooks, got some (offloading, weight normalization, your own). "
            "Quantize first; the new layer would not have them."
        )
    if choice.spec is not None:
        kind: Any = runtime_class(layer)
        kind.like(layer, choice.spec, device="meta")  # raises for a group size that does not fit
    check_numbers(site, weight, layer.bias)


def check_float(site: str, dtype: torch.dtype) -> None:
    """Raises ``ValueError`` for a weight that is no ordinary float: integers, or floats of 8 bits."""
    if not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"quantize: {site} must be float32, bfloat16 or float16, got {dtype}. Load the unquantized model.")


def check_numbers(site: str, weight: Tensor, bias: Tensor | None) -> None:
    """Raises ``ValueError`` that names the site of a weight or bias that cannot be quantized: no float, NaN, infinity."""
    if bias is not None and not bool(torch.isfinite(bias).all()):
        raise ValueError(
            f"quantize: {site} must have a finite bias, got NaN or infinity. The checkpoint is damaged; load it again."
        )
    check_float(site, weight.dtype)
    if weight.numel() and not all(math.isfinite(bound) for bound in weight.detach().aminmax()):  # NaN propagates; no temporaries
        raise ValueError(
            f"quantize: {site} must have finite weights, got NaN or infinity. "
            "The checkpoint is damaged; load it again, or keep this site at 16 bits."
        )


def numbers_of(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias."""
    return layer.weight, layer.bias


def layer_of(parts: Mapping[str, nn.Module], choice: Choice) -> nn.Module:
    """The layer of a choice."""
    return parts[choice.site.component].get_submodule(choice.site.path)

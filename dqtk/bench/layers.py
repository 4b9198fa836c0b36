"""Every distinct layer of a step by itself: quantized, at 16 bits and in float32, in the same rounds. The rows of a cost table."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dqtk.costs import Cost, LayerShape
from dqtk.ops import EMULATED, op_of, report_of
from dqtk.spec import LayerSpec

from .timing import Spread, interleaved, times_faster, waiter
from .variants import data_free

_HALF, _FLOAT32 = "16 bit", "float32"
_FEW = 16  # tokens: such layers take microseconds, and ten times as many rounds


def half_of(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit dtype that a compute dtype is measured against: itself, or bfloat16 beside float32."""
    return dtype if dtype.itemsize == 2 else torch.bfloat16


def name_of(dtype: torch.dtype) -> str:
    """``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def is_emulated(spec: LayerSpec, kind: str, device: torch.device) -> bool:
    """Whether nothing serves a spec's op on a device: its speed is then that of an emulation, and is not measured."""
    return report_of(op_of(spec, kind), device.type) == EMULATED


@torch.no_grad()
def measure_costs(
    wanted: Mapping[LayerShape, Sequence[LayerSpec]],
    dtype: torch.dtype,
    device: torch.device,
    repeats: int = 7,
    done: Callable[[], object] = lambda: None,
) -> list[Cost]:
    """Costs of every shape at 16 bits and with each of its specs.

    Args:
        wanted: shape -> specs.
        dtype: compute dtype of 16-bit and quantized layers.
        repeats: rounds per shape; ten times as many for up to 16 tokens.
        done: called behind every shape.
    """
    costs: list[Cost] = []
    for shape, specs in wanted.items():
        costs += _costs_of(shape, specs, dtype, device, repeats)
        done()
    return costs


def _costs_of(shape: LayerShape, specs: Sequence[LayerSpec], dtype: torch.dtype, device: torch.device, repeats: int) -> list[Cost]:
    half_dtype, x = half_of(dtype), torch.randn(shape.input, device=device)
    half, full = (plain_layer(shape, kind, device) for kind in (half_dtype, torch.float32))
    original = full if dtype == torch.float32 else half
    real = [spec for spec in specs if not is_emulated(spec, shape.kind, device)]
    layers: dict[str, Any] = {_HALF: half, _FLOAT32: full} | {str(i): data_free(original, spec) for i, spec in enumerate(real)}
    dtypes = {_HALF: half_dtype, _FLOAT32: torch.float32}
    methods = {name: _call(layer, x.to(dtypes.get(name, dtype))) for name, layer in layers.items()}
    times = interleaved(methods, repeats * (10 if shape.rows <= _FEW else 1), wait=waiter(device))

    def cost(name: str, spec: LayerSpec | None, kernel: str) -> Cost:
        spread = Spread.of([1e3 * seconds for seconds in times[name]])
        return Cost(
            shape=shape,
            spec=spec,
            kernel=kernel,
            milliseconds=spread.median,
            low=spread.low,
            high=spread.high,
            over_16_bit=None if name == _HALF else times_faster(times[_HALF], times[name]).median,
            over_float32=times_faster(times[_FLOAT32], times[name]).median,
        )

    found = [cost(_HALF, None, f"torch, {name_of(half_dtype)}")]
    for spec in specs:
        if spec in real:
            name = str(real.index(spec))
            found.append(cost(name, spec, layers[name].kernel()))
        else:
            kernel = f"{op_of(spec, shape.kind)}: {EMULATED}"
            found.append(Cost(shape=shape, spec=spec, kernel=kernel, milliseconds=None))
    return found


def _call(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: layer(x)


def plain_layer(shape: LayerShape, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """An ordinary layer of a shape with random weights."""
    how: dict[str, Any] = {"bias": shape.bias, "dtype": dtype, "device": device}
    if shape.kind == "linear":
        return nn.Linear(shape.k, shape.n, **how).requires_grad_(False)
    kinds: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    n, channels, *kernel = shape.weight
    geometry = {"stride": shape.stride, "padding": shape.padding, "dilation": shape.dilation}
    return kinds[len(shape.weight)](channels, n, tuple(kernel), **geometry, **how).requires_grad_(False)

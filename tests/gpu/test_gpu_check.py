"""benchmarks/gpu_check.py as far as a machine without a GPU goes: it refuses, needs torch only, and builds right layers."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"

# What a machine with a GPU may lack, and all layers that would be timed, in every tile and through torch.
LEAN = """
import sys
for name in ("diffusers", "transformers", "safetensors", "accelerate", "torchmetrics", "scipy", "PIL", "yaml", "pytest"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import torch
import gpu_check
gpu_check.open_rooms()
import triton_cases
from dqtk.gpu.tiles import PASSES as gpu_attention_passes, TILES
torch.manual_seed(0)
x = torch.randn(3, 128).bfloat16()
for kind in TILES:
    calls = gpu_check.candidates(kind, x, gpu_check.stored(kind, 72, 128, "cpu"))
    assert list(calls) == [*TILES[kind], None]
    expected = calls[None]()
    for tile, call in calls.items():
        torch.testing.assert_close(call(), expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item(), msg=f"{kind} {tile}")

order = iter(range(1000, 0, -1))
found = gpu_check.tune("cpu", (3,), ((72, 128),), lambda: 1, measure=lambda call: next(order), repeats=1)
assert [(row.kind, row.t, row.n, row.k, row.tile) for row in found] == [(kind, 3, 72, 128, None) for kind in TILES]
order = iter(range(1000))
found = gpu_check.tune("cpu", (3,), ((72, 128),), lambda: 1, measure=lambda call: next(order), repeats=1)
assert [row.tile for row in found] == [TILES[kind][0] for kind in TILES]
assert gpu_check.tune("cpu", (3,), ((72, 128),), lambda: -1) == []
methods = gpu_check.methods(3, 72, 128, "cpu")
for name in ("W8A8", "W8A16", "W4A8", "W4A16", "W8A8 torch", "W4A16 torch"):
    assert methods[name]().shape == (3, 72), name
assert torch.equal(methods["W8A8"](), methods["W8A8 torch"]())

import gpu_attention
import torch.nn.functional as F
shape = (2, 200, 32, 64, 64)
calls = gpu_attention.methods(shape, "cpu", None)
exact = calls["SDPA"]().float()
assert list(calls) == ["SDPA", *(f"{what} {bits}" for bits in (16, 8) for what in ("dense", "0.5", "0.3", "0.2"))]
for name, bound in (("dense 16", 0.01), ("dense 8", 0.03)):
    error = (calls[name]().float() - exact).norm() / exact.norm()
    assert error < bound, (name, error)
assert calls["0.3 16"]().shape == exact.shape
order = iter(range(1000, 0, -1))
found = gpu_attention.tune("cpu", lambda: 1, lambda call: next(order), lambda call: True, [shape], 1)
assert [(row.kind, row.t, row.n, row.k, row.tile) for row in found] == [
    ("attention16-64", 200, 64, 32, gpu_attention_passes["attention16-64"][-1]),
    ("attention8-64", 200, 64, 32, gpu_attention_passes["attention8-64"][-1]),
]
assert gpu_attention.tune("cpu", lambda: -1, None, None, [shape]) == []
assert list(gpu_attention.chosen(shape, torch.device("cpu"))) == [16, 8]
assert not {"dqtk.plan", "dqtk.quantize"} & set(sys.modules)
"""


def test_it_refuses_without_a_device():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        == "gpu_check: a CUDA device must be here, got none. Tests run the kernels without one: pytest tests/gpu"
    )


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_it_needs_the_kernel_rooms_only():
    environment = os.environ | {"TRITON_INTERPRET": "1", "DQTK_NATIVE": "off", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "error", "-c", LEAN, str(SCRIPT.parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr

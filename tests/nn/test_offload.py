"""Offload hooks of accelerate and diffusers move packed tensors and change no result."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from accelerate.utils import offload_state_dict
from diffusers.hooks import apply_group_offloading
from torch import nn

from dqtk.nn import BUFFERS
from dqtk.numerics.codebook import bitmod
from dqtk.spec import Dynamic, E4M3Group, E8M0Group, Float, Hadamard, LayerSpec, PerGroup, TensorSpec

E2M1 = Float(exponent=2, mantissa=1)
NVFP4 = LayerSpec(
    weight=TensorSpec(format=E2M1, granularity=E4M3Group(size=8)),
    input=TensorSpec(format=E2M1, granularity=E4M3Group(size=8), range=Dynamic()),
    transforms=(Hadamard(),),
)
BITMOD = LayerSpec(weight=TensorSpec(format=bitmod(4), granularity=PerGroup(size=8)))
MXFP8 = LayerSpec(
    weight=TensorSpec(format=Float(), granularity=E8M0Group(size=8)),
    input=TensorSpec(format=Float(), granularity=E8M0Group(size=8), range=Dynamic()),
)
KINDS = [("w8", "w4", "w8"), ("w8a8", "w4a8-rtn", "w4a8-rtn"), ("fp8", "wfp8", "w8a8-static"), (NVFP4, BITMOD, MXFP8)]


def short(kinds):
    return ", ".join(map(str, kinds))


def batch():
    return torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(3))


def dtypes(model):
    return {name: tensor.dtype for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("buffers", [True, False])
@pytest.mark.parametrize("kinds", KINDS, ids=short)
def test_sequential_offload(small, kinds, buffers):
    model, x = small(*kinds).bfloat16(), batch().bfloat16()
    expected, before = model(x), dtypes(model)
    cpu_offload(model, torch.device("cpu"), offload_buffers=buffers)
    assert model.first.bias.is_meta
    assert model.first.qweight.is_meta == buffers
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert dtypes(model) == before
    assert model.first.compute_dtype == torch.bfloat16
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(model(x), expected)


def test_dispatch_from_disk(small, tmp_path):
    model, x = small("w8a8", "w4a8-rtn", "w4"), batch()
    expected = model(x)
    offload_state_dict(tmp_path, {name: t for name, t in model.state_dict().items() if t.numel()})
    placed = dispatch_model(
        model, {"first": "cpu", "second": "cpu", "conv": "disk"}, main_device="cpu", offload_dir=tmp_path, offload_buffers=True
    )
    assert torch.equal(placed(x), expected)


class Stack(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        return sum(block(x) for block in self.blocks)


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
@pytest.mark.parametrize("kinds", KINDS, ids=short)
def test_group_offload(small, kinds, kind):
    model, x = Stack([small(*kinds), small(*reversed(kinds))]), batch()
    expected, before = model(x), dtypes(model)
    options = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), offload_type=kind, **options)
    for _ in range(2):
        assert torch.equal(model(x), expected)
    assert dtypes(model) == before


def test_group_offload_to_disk(small, tmp_path):
    model, x = small("w8a8", "w4a8-rtn", "w4"), batch()
    expected = model(x)
    apply_group_offloading(
        model, torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    assert torch.equal(model(x), expected)
    assert {name for name in BUFFERS if getattr(model.second, name) is not None} == {"qweight", "scale", "group_scale"}

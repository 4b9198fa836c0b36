"""Bytes in memory and on disk."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dqtk
from dqtk.report.numbers import bytes_text, number_text, range_text, ratio_text
from dqtk.report.sizes import bytes_at_16_bit, bytes_in_memory, bytes_on_disk, pipeline_sizes, zero_share


def test_parameters_and_buffers_once_each():
    module = nn.Linear(10, 4, dtype=torch.bfloat16)  # 80 + 8 bytes
    module.register_buffer("qweight", torch.zeros(7, dtype=torch.uint8))
    assert bytes_in_memory(module) == 95
    tied = nn.ModuleList([module, nn.Linear(10, 4, bias=False)])
    tied[1].weight = module.weight
    assert bytes_in_memory(tied) == 95
    with torch.device("meta"):
        assert bytes_in_memory(nn.Linear(10, 4)) == 176


def test_sixteen_bit_sizes_keep_codes_and_scales():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    assert bytes_at_16_bit(model) == 2 * (64 * 64 + 64) * 2
    dqtk.quantize(model, dqtk.plan(model, "w8a16", overrides={"1": None}), progress=False)
    assert bytes_at_16_bit(model) == (64 * 64 + 64 * 4 + 64 * 2) + (64 * 64 + 64) * 2
    wide = bytes_at_16_bit(model)
    assert bytes_in_memory(model.to(torch.bfloat16)) == bytes_at_16_bit(model) == wide


def test_share_of_exact_zeros():
    """Of quantized weights only, each counted once; fewer bits leave more, E2M1 fewer than INT4 (its steps are finest at 0)."""
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 16))
    assert zero_share(model) is None
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(2048).view(32, 64) % 4)  # a quarter zeros, and levels of every row's grid
        model[1].weight.fill_(1.0)
    dqtk.quantize(model, dqtk.plan(model, "w8a16", overrides={"1": None}), progress=False)
    assert zero_share(model) == 0.25
    shares = {}
    for recipe in ("w8a16", "w4a16", "w4a8-rtn", "nvfp4"):
        torch.manual_seed(0)
        other = nn.Sequential(nn.Linear(256, 128))
        dqtk.quantize(other, recipe, progress=False)
        weight = other[0].stored_matrix()
        shares[recipe] = zero_share(other)
        assert shares[recipe] == float((weight == 0).float().mean())
    assert shares["w8a16"] < shares["nvfp4"] < shares["w4a8-rtn"] < 0.2


def test_saved_folder_by_component(tmp_path):
    for name, size in (
        ("unet/a-00001-of-00002.safetensors", 5),
        ("unet/a-00002-of-00002.safetensors", 6),
        ("vae/m.bin", 3),
        ("x.pt", 2),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"0" * size)
    (tmp_path / "unet" / "config.json").write_text("{}")
    assert bytes_on_disk(tmp_path) == {"unet": 11, "vae": 3, "": 2}
    pipe = SimpleNamespace(components={"unet": nn.Linear(2, 2, bias=False), "scheduler": object(), "vae": None})
    sizes = {size.name: (size.in_memory, size.on_disk) for size in pipeline_sizes(pipe, tmp_path)}
    assert sizes == {"unet": (16, 11), "vae": (None, 3), "": (None, 2)}
    with pytest.raises(
        ValueError, match=r"bytes_on_disk: folder must be a saved pipeline's folder, got .*nowhere'\. Save the pipeline first"
    ):
        bytes_on_disk(tmp_path / "nowhere")


def test_numbers_as_people_read_them():
    assert [bytes_text(n) for n in (0, 1023, 1536, 5 * 2**20, 3 * 2**30, None)] == [
        "0 B",
        "1.02 kB",
        "1.54 kB",
        "5.24 MB",
        "3.22 GB",
        "\N{EN DASH}",
    ]
    assert number_text(-0.5, 2) == "\N{MINUS SIGN}0.50"
    assert range_text(None, None, 2) == "one prompt only"
    assert range_text(-1, 2, 1, "+") == "\N{MINUS SIGN}1.0 to +2.0"
    assert ratio_text(4, 1) == "0.25\N{MULTIPLICATION SIGN}"
    assert ratio_text(None, 1) == ratio_text(0, 1) == "\N{EN DASH}"


class Wrapped(torch.Tensor):
    """A tensor without memory of its own, as peers' quantized weights are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Wrapped(args[0].inner)
        raise AssertionError(f"nobody should compute with it: {func}")


def test_wrappers_of_wrappers_count_what_lies_inside():
    module = nn.Module()
    module.weight = nn.Parameter(Wrapped(Wrapped(torch.zeros(3, 5, dtype=torch.int8))), requires_grad=False)
    assert bytes_in_memory(module) == 15

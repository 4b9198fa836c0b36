"""Calls with a layer changed that do not compute what stands in front of it: the same bits, fewer blocks, in full where need be."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from dqtk.calibrate.prefix import Prefix
from dqtk.calibrate.replay import Call, arguments_for

PLENTY = 2**30


class Block(nn.Module):
    """spoils: writes to what it is given, which the blocks behind it are given too."""

    def __init__(self, spoils=False):
        super().__init__()
        self.up, self.down, self.spoils, self.ran = nn.Linear(8, 16), nn.Linear(16, 8), spoils, 0

    def forward(self, x, first):
        self.ran += 1
        if self.spoils:
            first.mul_(0.9)
        return x + 0.1 * first + self.down(self.up(x).tanh())


class Chain(nn.Module):
    """Blocks that all see what the embedding made. again: the first block is also called at the end."""

    def __init__(self, spoils=None, again=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Linear(8, 8), nn.ModuleList(Block(spoils == number) for number in range(5))
        self.out, self.again = nn.Linear(8, 8), again

    def forward(self, x):
        first = self.embed(x)
        for block in self.blocks:
            x = block(x, first)
        return (self.out(self.blocks[0](x, first) if self.again else x),)


def calls(num=3):
    draw = torch.Generator().manual_seed(1)
    return [Call("transformer", (), {"x": torch.randn(2, 3 + i, 8, generator=draw)}, 0.5) for i in range(num)]


@torch.no_grad()
def in_full(module, made):
    """By a copy, which knows nothing of what was kept."""
    twin = copy.deepcopy(module)
    return [twin(**arguments_for(twin, call))[0] for call in made]


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def ran(module, prefix):
    """Outputs, and how often each block ran for them."""
    before = [block.ran for block in module.blocks]
    return prefix.outputs(), [block.ran - num for block, num in zip(module.blocks, before, strict=True)]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("embed", [3, 3, 3, 3, 3]),
        ("blocks.0.up", [3, 3, 3, 3, 3]),
        ("blocks.2.down", [0, 0, 3, 3, 3]),
        ("blocks.4.up", [0, 0, 0, 0, 3]),
        ("out", [0, 0, 0, 0, 0]),
    ],
)
def test_blocks_in_front_of_a_changed_layer_do_not_run(path, expected):
    module, made = Chain(), calls()
    prefix = Prefix(module, made, PLENTY)
    assert same(prefix.exact, in_full(module, made))
    before, (parent, _, name) = module.get_submodule(path), path.rpartition(".")
    setattr(module.get_submodule(parent), name, nn.Linear(before.in_features, before.out_features))
    for compared in (1, 0):  # the first call once more in full, when it is the first time
        found, times = ran(module, prefix)
        assert times == [num + compared * (0 in expected) for num in expected]
        assert same(found, in_full(module, made))
        assert not same(found, prefix.exact)
    setattr(module.get_submodule(parent), name, before)
    assert same(prefix.outputs(), prefix.exact)


def test_the_first_of_several_changes_decides():
    module, made = Chain(), calls()
    prefix = Prefix(module, made, PLENTY)
    module.blocks[3].up, module.blocks[1].down = nn.Linear(8, 16), nn.Linear(16, 8)
    prefix.outputs()
    found, times = ran(module, prefix)
    assert times == [0, 3, 3, 3, 3]
    assert same(found, in_full(module, made))


def test_a_weight_that_is_written_to_is_seen():
    module, made = Chain(), calls()
    prefix = Prefix(module, made, PLENTY)
    with torch.no_grad():
        module.blocks[1].up.weight.mul_(2)
    found, _ = ran(module, prefix)
    assert same(found, in_full(module, made))
    assert not same(found, prefix.exact)


def test_a_block_that_writes_to_its_input_ends_it():
    module, made = Chain(spoils=1), calls()
    prefix = Prefix(module, made, PLENTY)
    module.blocks[3].up = nn.Linear(8, 16)
    assert same(prefix.outputs(), in_full(module, made))
    assert not prefix.trusted
    found, times = ran(module, prefix)
    assert times == [3, 3, 3, 3, 3]
    assert same(found, in_full(module, made))


def test_a_block_that_comes_twice_always_runs():
    module, made = Chain(again=True), calls()
    prefix = Prefix(module, made, PLENTY)
    module.blocks[3].up = nn.Linear(8, 16)
    prefix.outputs()
    found, times = ran(module, prefix)
    assert times == [6, 0, 0, 3, 3]
    assert same(found, in_full(module, made))


def test_calls_that_do_not_fit_are_made_in_full():
    module, made = Chain(), calls()
    one = 5 * made[0].kwargs["x"].numel() * 4  # answers of five blocks in the first call
    prefix = Prefix(module, made, one)
    module.out = nn.Linear(8, 8)
    prefix.outputs()
    found, times = ran(module, prefix)
    assert times == [2, 2, 2, 2, 2]
    assert same(found, in_full(module, made))


def test_blocks_of_a_unet_answer_what_they_answered_whichever_layer_changes():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    ).eval()
    kwargs = {"sample": torch.randn(1, 4, 8, 8), "timestep": torch.tensor(3), "encoder_hidden_states": torch.randn(1, 3, 8)}
    made = [Call("unet", (), kwargs, 0.5)]
    prefix, shares = Prefix(unet, made, PLENTY), {}
    for path, layer in list(unet.named_modules()):
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        weight = layer.weight.detach().clone()
        with torch.no_grad():
            layer.weight.add_(0.1)
        prefix.outputs()
        shares[path] = len(prefix.left_out(0, [path]))
        assert prefix.trusted, path
        assert same(prefix.outputs(), in_full(unet, made)), path
        layer.weight = nn.Parameter(weight)
        prefix = Prefix(unet, made, PLENTY)
    assert shares["conv_in"] == shares["time_embedding.linear_1"] == 0
    assert shares["mid_block.resnets.0.conv1"] == 2  # both blocks of the way down, whole
    assert shares["conv_out"] > shares["up_blocks.0.resnets.0.conv1"] > 2

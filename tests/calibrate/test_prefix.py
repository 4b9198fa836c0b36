"""Calls with a layer changed that do not compute what stands in front of it: the same bits, fewer blocks, in full where need be."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from dqtk.calibrate import prefix as prefixes
from dqtk.calibrate.prefix import Prefix
from dqtk.calibrate.replay import Call, arguments_for
from dqtk.calibrate.stub import copied

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
    for compared in (3, 0):  # calls of every size once more in full, when it is the first time
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


@pytest.mark.parametrize("turned", [False, True])
def test_a_block_that_writes_to_its_input_ends_it(turned):
    module, made = Chain(spoils=1), calls()[:: -1 if turned else 1]
    small = 5 * made[-1].kwargs["x"].numel() * 4
    prefix = Prefix(module, made, small if turned else PLENTY)  # turned: only the last call's answers have room
    module.blocks[3].up = nn.Linear(8, 16)
    with pytest.warns(UserWarning, match="blocks of Chain depend on each other's calls; all are computed"):
        assert same(prefix.outputs(), in_full(module, made))
    assert not prefix.trusted
    found, times = ran(module, prefix)
    assert times == [3, 3, 3, 3, 3]
    assert same(found, in_full(module, made))


class Aside(nn.Module):
    """Blocks that hand something on which is no answer."""

    def __init__(self):
        super().__init__()
        self.blocks, self.notes = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), {}
        first = self.blocks[0].forward
        self.blocks[0].forward = lambda x: self.note(first(x))

    def note(self, x):
        self.notes["first"] = 2.0
        return x

    def forward(self, x):
        self.notes.clear()
        x = self.blocks[1](self.blocks[0](x)) * self.notes["first"]
        return (self.blocks[2](x),)


def test_a_model_that_cannot_do_without_its_blocks_computes_them():
    module, made = Aside(), calls()
    prefix = Prefix(module, made, PLENTY)
    with torch.no_grad():
        module.blocks[2].weight.mul_(2)
    with pytest.warns(UserWarning, match="blocks of Aside"):
        found = prefix.outputs()
    bias = module.blocks[2].bias.detach()
    for y, exact in zip(found, prefix.exact, strict=True):
        torch.testing.assert_close(y, 2 * (exact - bias) + bias)
    assert same(prefix.outputs(), found)


def test_a_block_that_comes_twice_always_runs():
    module, made = Chain(again=True), calls()
    prefix = Prefix(module, made, PLENTY)
    module.blocks[3].up = nn.Linear(8, 16)
    prefix.outputs()
    found, times = ran(module, prefix)
    assert times == [6, 0, 0, 3, 3]
    assert same(found, in_full(module, made))


@pytest.mark.parametrize("turned", [False, True])
def test_calls_that_do_not_fit_are_made_in_full(turned, monkeypatch):
    module, made = Chain(), calls()[:: -1 if turned else 1]
    one = 5 * made[-1 if turned else 0].kwargs["x"].numel() * 4  # answers of five blocks in the smallest call
    copies = []
    monkeypatch.setattr(prefixes, "copied", lambda answer: copies.append(answer.nbytes) or copied(answer))
    prefix = Prefix(module, made, one)
    assert sum(copies[-5 if turned else 0 : None if turned else 5]) == one
    assert sum(copies) <= (3 * one if turned else one)  # no more than fits, of each call
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

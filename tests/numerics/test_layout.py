"""Sequences as grids: orders of tokens, positions, and what a denoiser's call tells about its tokens."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dqtk.calls import layouts_of
from dqtk.numerics.layout import NAMES, ORDERS, Layout

VIDEO = Layout(3, 4, 5, before=7, after=2)


def test_six_orders_have_their_names():
    assert NAMES == ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")
    assert VIDEO.tokens == 7 + 60 + 2
    assert VIDEO.orders() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("grid", "names"), [((1, 4, 5), ["FHW", "FWH"]), ((3, 1, 5), ["FHW", "HWF"]), ((1, 1, 9), ["FHW"])])
def test_axes_of_one_token_make_no_orders(grid, names):
    assert [NAMES[index] for index in Layout(*grid).orders()] == names


@pytest.mark.parametrize("order", range(6))
def test_an_order_is_a_permutation_that_leaves_text(order):
    index = VIDEO.index(order)
    assert index.dtype == torch.int32
    assert sorted(index.tolist()) == list(range(VIDEO.tokens))
    assert index[:7].tolist() == list(range(7))
    assert index[-2:].tolist() == [67, 68]


@pytest.mark.parametrize("order", range(6))
def test_the_innermost_axis_moves_first(order):
    where = VIDEO.positions(order)[7:-2]
    steps = where[1] - where[0]
    assert steps.abs().tolist() == [int(axis == ORDERS[order][2]) for axis in range(3)]
    place = VIDEO.index(order)[7:-2] - 7
    assert torch.equal(place.long(), where[:, 0] * 20 + where[:, 1] * 5 + where[:, 2])


def test_the_plain_order_is_as_tokens_lie():
    assert torch.equal(VIDEO.index(0), torch.arange(VIDEO.tokens, dtype=torch.int32))
    assert (VIDEO.positions(3)[:7] == -1).all()


class Denoiser(nn.Module):
    def __init__(self, patch_size=None):
        super().__init__()
        self.config = SimpleNamespace(patch_size=patch_size)


@pytest.mark.parametrize(
    ("patch", "shape", "grid"),
    [(2, (1, 4, 16, 24), (1, 8, 12)), (None, (1, 4, 16, 24), (1, 16, 24)), ((1, 2, 2), (2, 8, 9, 16, 16), (9, 8, 8))],
)
def test_latents_are_cut_into_patches(patch, shape, grid):
    found = layouts_of(Denoiser(patch), {"hidden_states": torch.empty(shape)})
    assert found == {math.prod(grid): Layout(*grid)}


def test_latents_of_another_shape_need_an_adapter():
    with pytest.raises(
        ValueError, match=r"attention: latents of Denoiser must be \[B, C, H, W\] or .* got \(1, 64, 32\)\. Its family"
    ):
        layouts_of(Denoiser(), {"hidden_states": torch.empty(1, 64, 32)})


def test_sequences_of_one_length_have_one_layout():
    def rule(module, arguments):
        return [(1, 4, 4), (1, 2, 2), (1, 4, 4), *arguments["more"]]

    assert layouts_of(Denoiser(), {"more": []}, rule) == {16: Layout(1, 4, 4), 4: Layout(1, 2, 2)}
    with pytest.raises(
        ValueError,
        match=r"sequences of 16 tokens in one call of Denoiser must have one .* got \(1, 4, 4, 0, 0\) and \(1, 1, 16, 0",
    ):
        layouts_of(Denoiser(), {"more": [(1, 1, 16)]}, rule)

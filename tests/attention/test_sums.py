"""Attention summed over blocks, against maps of all scores in float64."""

import pytest
import torch

from dqtk.attention import sums
from dqtk.attention.sums import block_sums
from dqtk.numerics.layout import Layout

LAYOUT = Layout(3, 4, 5, before=4)


@pytest.fixture
def given():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(2, LAYOUT.tokens, 16, generator=draw) for _ in range(2)]


def whole(q, k, mask=None):
    scores = q.double() @ k.double().transpose(1, 2) * 0.3
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return scores.softmax(-1).nan_to_num(0.0)


def blocks(p, index, block):
    """Lists of lists of the map's blocks [H, r, c] in an order."""
    p = p[:, index.long()][:, :, index.long()]
    return [part.split(block[1], dim=2) for part in p.split(block[0], dim=1)]


@pytest.mark.parametrize("block", [(16, 16), (16, 8)])
@pytest.mark.parametrize("masked", ["no", "bool", "float"])
def test_blocks_hold_what_the_map_holds(given, block, masked):
    q, k = given
    mask = None
    if masked != "no":
        mask = torch.ones(1, LAYOUT.tokens, dtype=torch.bool)
        mask[:, :3] = False
        mask = mask if masked == "bool" else torch.zeros(1, LAYOUT.tokens).masked_fill(~mask, -1e4)
    indices = [LAYOUT.index(order) for order in range(6)]
    found = block_sums(q, k, mask, 0.3, indices, block, small=1e-3, largest=True)
    p = whole(q, k, mask)
    for index, mine in zip(indices, found, strict=True):
        expected = blocks(p, index, block)
        for r, row in enumerate(expected):
            for c, part in enumerate(row):
                torch.testing.assert_close(mine.mass[:, r, c].double(), part.sum((1, 2)) / part.shape[1], rtol=1e-5, atol=1e-7)
                torch.testing.assert_close(mine.most[:, r, c].double(), part.amax((1, 2)), rtol=1e-5, atol=1e-7)
                share = (part < 1e-3).double().mean((1, 2))
                torch.testing.assert_close(mine.small[:, r, c].double(), share, rtol=0, atol=2 / part[0].numel())
    assert all(torch.allclose(mine.mass.sum(-1), torch.ones(())) for mine in found)


def test_rows_are_bounded_by_bytes():
    assert sums.rows_at_once(4, 576) == 512
    assert sums.rows_at_once(40, 75_600) == 22
    assert 40 * 75_600 * sums.rows_at_once(40, 75_600) * 4 <= 2**28
    assert sums.rows_at_once(96, 10**6) == 16


def test_rows_at_once_change_nothing(given, monkeypatch):
    q, k = given
    whole_rows = block_sums(q, k, None, 0.3, [LAYOUT.index(1)], (16, 16), small=1e-3, largest=True)[0]
    monkeypatch.setattr(sums, "PROBABILITIES_AT_ONCE", 0)
    shapes = [p.shape[1] for _, p in sums.probabilities(q, k, None, 0.3, torch.arange(LAYOUT.tokens))]
    assert shapes == [16, 16, 16, 16]
    some = block_sums(q, k, None, 0.3, [LAYOUT.index(1)], (16, 16), small=1e-3, largest=True)[0]
    for mine, other in ((whole_rows.mass, some.mass), (whole_rows.most, some.most), (whole_rows.small, some.small)):
        torch.testing.assert_close(mine, other)


def test_some_rows_of_a_long_sequence_stand_for_the_others(monkeypatch):
    draw = torch.Generator().manual_seed(1)
    layout = Layout(1, 16, 16)
    indices = [layout.index(order) for order in (0, 1)]
    place = layout.positions(0)[:, 1:].float()
    q = k = torch.cat([place, torch.randn(256, 2, generator=draw)], dim=1)[None] * 0.3  # rows are like their neighbours
    monkeypatch.setattr(sums, "MOST_ROWS", 10**6)
    whole = block_sums(q, k, None, 0.5, indices, (16, 16))
    monkeypatch.setattr(sums, "MOST_ROWS", 64)
    monkeypatch.setattr(sums, "ROWS_PER_BLOCK", 1)
    for some, every in zip(block_sums(q, k, None, 0.5, indices, (16, 16)), whole, strict=True):
        assert torch.allclose(some.mass.sum(-1), torch.ones(()))  # also where no row was drawn
        assert float((some.mass - every.mass).abs().mean()) < 0.2 * float(every.mass.mean())


def test_no_map_of_all_scores_is_held(given, monkeypatch):
    q, k = (t[:1].repeat(1, 40, 1) for t in given)
    monkeypatch.setattr(sums, "PROBABILITIES_AT_ONCE", 32 * q.shape[1])
    seen = []
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda self, dim: seen.append(tuple(self.shape)) or softmax(self, dim))
    block_sums(q, k, None, 0.3, [torch.arange(q.shape[1])], (64, 64))
    assert max(shape[1] for shape in seen) <= 32

"""Masks of blocks: guards, budgets, storage, rules without calibration, and another resolution."""

import itertools
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dqtk.numerics.block_masks import (
    above,
    carried,
    counts,
    guards,
    largest,
    largest_of_all,
    near,
    pack,
    pooled,
    radial,
    row_budget,
    unpack,
)
from dqtk.numerics.layout import Layout

IMAGE, VIDEO = Layout(1, 16, 16), Layout(4, 8, 8, before=20, after=0)


def test_guards_are_the_diagonal_text_and_a_ragged_end():
    layout = Layout(1, 10, 10, before=20)
    keep = guards(layout, (16, 16))
    assert counts(layout, (16, 16)) == (8, 8)
    assert keep.diagonal().all()
    for blocks in (keep, keep.T):
        assert blocks[:2].all()  # 20 text tokens reach into the second block
        assert blocks[-1].all()  # 8 tokens only
    assert not keep[2, 3]
    assert int(keep.sum()) == 8 * 8 - 5 * 5 + 5


def test_text_behind_the_grid_is_guarded_too():
    keep = guards(Layout(1, 8, 8, after=10), (16, 16))
    assert keep[4].all()
    assert keep[:, 4].all()
    assert not keep[0, 1]


def test_rectangular_blocks_see_their_diagonal():
    keep = guards(IMAGE, (32, 16))
    assert keep.shape == (8, 16)
    assert all(keep[r, 2 * r] and keep[r, 2 * r + 1] for r in range(8))
    assert int(keep.sum()) == 16


@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 1.0])
def test_a_budget_is_spent_on_the_largest(density):
    mass = torch.rand(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    keep = largest(mass, guards(IMAGE, (16, 16)), density)
    assert keep.sum() == max(round(density * mass.numel()), int(keep.sum()) if density == 0.1 else 0)
    assert keep.any(-1).all()
    assert keep.diagonal(dim1=-2, dim2=-1).all()
    free = ~guards(IMAGE, (16, 16)).expand_as(mass) & ~torch.zeros_like(keep).scatter_(-1, mass.argmax(-1, keepdim=True), True)
    if bool((free & ~keep).any()) and bool((free & keep).any()):
        assert mass[free & keep].min() >= mass[free & ~keep].max()


def test_every_row_keeps_its_largest_block_whatever_the_budget():
    mass = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(1))
    keep = largest(mass, torch.zeros(16, 16, dtype=torch.bool), 0.01)
    assert torch.equal(keep, torch.zeros_like(keep).scatter_(-1, mass.argmax(-1, keepdim=True), True))


@pytest.mark.parametrize("density", [0.01, 0.1, 0.3, 0.77, 1.0])
def test_one_budget_for_several_is_the_global_choice(density):
    draw = torch.Generator().manual_seed(0)
    guard = guards(IMAGE, (16, 16))
    parts = [torch.rand(2, heads, 16, 16, generator=draw).square().half() for heads in (3, 1, 4)]
    found = largest_of_all(parts, guard, density)
    assert [keep.shape for keep in found] == [part.shape for part in parts]
    joined, keep = (torch.cat([x.flatten(0, 1) for x in each]) for each in (parts, found))
    wanted = largest(joined, guard, density)
    assert int(keep.sum()) == int(wanted.sum())
    assert torch.equal(joined[keep].sort().values, joined[wanted].sort().values)
    differ = joined[keep != wanted]
    assert len(differ) == 0 or float(differ.max()) == float(differ.min())  # ties


def test_of_equal_blocks_the_first_stay():
    parts = [torch.zeros(1, 4, 4, dtype=torch.float16), torch.zeros(2, 4, 4, dtype=torch.float16)]
    found = largest_of_all(parts, torch.eye(4, dtype=torch.bool), 0.75)
    assert [int(keep.sum()) for part in found for keep in part] == [16, 13, 7]  # 7: the diagonal and the first column
    parts[1][1] = 1.0
    found = largest_of_all(parts, torch.eye(4, dtype=torch.bool), 0.75)
    assert [int(keep.sum()) for part in found for keep in part] == [13, 7, 16]


class Bytes(TorchDispatchMode):
    """Peak bytes of the storages that are made while it is open and still alive."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.holders = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and (at := made.untyped_storage().data_ptr()):
                if at not in self.holders and at not in given:
                    self.holders[at] = [made.untyped_storage().nbytes(), 0]
                    self.alive += made.untyped_storage().nbytes()
                    self.peak = max(self.peak, self.alive)
                if at in self.holders:
                    self.holders[at][1] += 1
                    weakref.finalize(made, self.gone, at)
        return out

    def gone(self, at):
        self.holders[at][1] -= 1
        if not self.holders[at][1]:
            self.alive -= self.holders.pop(at)[0]


def test_one_budget_for_several_makes_no_copy_of_all():
    draw, guard = torch.Generator().manual_seed(0), torch.eye(96, dtype=torch.bool)
    parts = [torch.rand(4, 8, 96, 96, generator=draw).half() for _ in range(8)]
    blocks = sum(part.numel() for part in parts)
    with Bytes() as joined:
        largest(torch.cat(parts), guard, 0.3)
    with Bytes() as apart:
        found = largest_of_all(parts, guard, 0.3)
    assert joined.peak > 6 * blocks  # as it was: 2 bytes joined, as many without those that are kept, a byte of the answer, places
    assert blocks <= apart.peak <= blocks + 8 * 8 * 2**15  # the answer and a few histograms
    assert sum(int(part.sum()) for part in found) == round(0.3 * blocks)


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 278])
def test_packed_masks_come_back(columns):
    keep = torch.rand(2, 3, 5, columns, generator=torch.Generator().manual_seed(0)) < 0.4
    bits = pack(keep)
    assert bits.dtype == torch.uint8
    assert bits.shape == (2, 3, 5, -(-columns // 8))
    assert torch.equal(unpack(bits, columns), keep)


def test_the_first_block_is_the_lowest_bit():
    assert pack(torch.tensor([[True, False, False, True]])).tolist() == [[9]]


def test_near_blocks_are_near_in_the_grid_in_every_order():
    layout = Layout(8, 8, 8)
    for order in range(6):
        keep = near(layout, order, (64, 64), 0.5)
        assert abs(float(keep.float().mean()) - 0.5) <= 0.02
        assert keep[3, 3]
        assert keep[3, 4]
        assert not keep[0, 7]  # the first and the last slice of the outermost axis


def test_radial_windows_shrink_with_the_distance_of_frames():
    layout = Layout(8, 8, 8)
    keep = radial(layout, 0, (16, 16), 0.4)
    per_frame = keep.unflatten(0, (8, 4)).unflatten(2, (8, 4)).float().mean((1, 3))
    first = per_frame[0]
    assert all(a >= b for a, b in itertools.pairwise(first))
    assert first[7] <= first[2] < first[1]


def test_pooled_blocks_follow_the_attention():
    layout = Layout(1, 16, 16, after=9)
    guard = guards(layout, (16, 16))
    centres = 5 * torch.eye(17).repeat_interleave(16, 0)[: layout.tokens].expand(1, 2, -1, -1)
    turn = torch.arange(layout.tokens).roll(48)  # a block sees the one three before it
    q, k = centres[:, :, turn], centres
    keep = pooled(q, k, None, guard, (16, 16), 1.0, 1 / 17)
    assert all(bool(keep[h, r, (r - 3) % 17]) for h in range(2) for r in range(4, 16))
    assert (keep | ~guard).all()
    assert int(keep[:, 4:16].sum()) <= int(guard[4:16].sum()) * 2 + 2 * 12
    index = layout.index(1).expand(2, -1)
    moved = torch.argsort(index.long(), dim=1)[None, :, :, None].expand_as(q)
    again = pooled(q.gather(2, moved), k.gather(2, moved), index, guard, (16, 16), 1.0, 1 / 17)
    assert torch.equal(again, keep)  # the same tokens, read in an order that puts them back


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("ordered", [False, True])
def test_pooled_blocks_do_not_look_at_keys_that_no_query_sees(kind, ordered):
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, 128, 8, generator=draw) for _ in range(2))
    index = torch.stack([torch.randperm(128, generator=draw) for _ in range(3)]) if ordered else None
    seen = torch.rand(1, 1, 1, 128, generator=draw) < 0.5
    if not ordered:
        seen[..., 32:48] = False  # a whole block
    mask = seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    free = torch.zeros(8, 8, dtype=torch.bool)
    keep = pooled(q, k, index, free, (16, 16), 1.0, 3 / 8, mask)
    other = torch.where(seen.transpose(2, 3), k, 9 * torch.randn(k.shape, generator=draw))
    assert torch.equal(pooled(q, other, index, free, (16, 16), 1.0, 3 / 8, mask), keep)
    assert not torch.equal(pooled(q, other, index, free, (16, 16), 1.0, 3 / 8), keep)
    assert int(keep.sum()) == 3 * 8 * 3
    if not ordered:
        assert not keep[..., 2].any()


def test_pooled_blocks_count_the_pairs_that_are_seen():
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 64, 8, generator=draw) for _ in range(2))
    index = torch.stack([torch.randperm(64, generator=draw) for _ in range(2)])
    apart = torch.rand(1, 2, 4, 4, generator=draw) < 0.5
    apart[..., 0] = True
    place = torch.argsort(index, dim=1)  # of every token
    whole = apart.repeat_interleave(16, 2).repeat_interleave(16, 3)[0]
    mask = torch.stack([head[at][:, at] for head, at in zip(whole, place, strict=True)])[None]
    keep = pooled(q, k, index, torch.zeros(4, 4, dtype=torch.bool), (16, 16), 1.0, 0.25, mask)
    assert bool((keep <= apart[0]).all())
    nothing = pooled(q, k, index, torch.eye(4, dtype=torch.bool), (16, 16), 1.0, 0.25, torch.zeros(64, 64, dtype=torch.bool))
    assert bool(nothing.diagonal(dim1=1, dim2=2).all())
    assert pooled(q, k, None, torch.eye(4, dtype=torch.bool), (16, 16), 1.0, 0.25, torch.ones(64, 64)).equal(
        pooled(q, k, None, torch.eye(4, dtype=torch.bool), (16, 16), 1.0, 0.25)
    )  # the same weight for all


@pytest.mark.parametrize(
    ("layout", "block"), [(IMAGE, (16, 16)), (VIDEO, (16, 16)), (Layout(1, 15, 17), (16, 32)), (Layout(2, 8, 8, after=3), (8, 16))]
)
@pytest.mark.parametrize("density", [0.01, 0.2, 0.3, 0.45, 0.9, 1.0])
def test_guards_count_in_the_density_of_pooled_blocks(layout, block, density):
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, layout.tokens, 8, generator=draw) for _ in range(2))
    guard = guards(layout, block)
    keep = pooled(q, k, None, guard, block, 1.0, density)
    assert bool((keep | ~guard).all())
    wanted = round(density * keep.numel())
    least = 3 * int(guard.sum())
    if wanted > least + 3 * len(guard):  # a row's largest block may stand beside its guards
        assert int(keep.sum()) == wanted
    else:
        assert max(wanted, least) <= int(keep.sum()) <= max(wanted, least) + 3 * len(guard)


def test_rows_share_a_budget_evenly():
    guard = torch.zeros(6, 8, dtype=torch.bool)
    guard[0] = True
    guard[1, :4] = True
    found = row_budget(guard, 2, 31 / 96)
    assert int(found.sum()) == 31
    assert found[:, 0].tolist() == [8, 8]
    assert found[:, 1].tolist() == [4, 4]
    assert sorted(found[:, 2:].flatten().tolist()) == [0] + [1] * 7
    assert row_budget(guard, 2, 1.0).tolist() == [[8] * 6] * 2
    assert row_budget(guard, 1, 0.1).tolist() == [[8, 4, 0, 0, 0, 0]]  # guards alone are more
    spread = row_budget(torch.eye(16, dtype=torch.bool), 1, (16 * 3 + 4) / 256)[0]
    assert (spread == 4).nonzero().flatten().tolist() == [3, 7, 11, 15]


def test_a_mask_is_carried_to_a_larger_grid():
    source, target = Layout(1, 16, 16), Layout(1, 32, 32)
    keep = torch.eye(16, dtype=torch.bool)
    keep[0, 15] = True  # the first row of the picture sees the last
    moved = carried(keep, source, target, 0, (16, 16))
    assert moved.shape == counts(target, (16, 16))
    rows = moved.unflatten(0, (32, 2)).unflatten(2, (32, 2)).any(3).any(1)  # two blocks per row of tokens
    assert rows[0, 31]
    assert rows[1, 30]
    assert not rows[2, 31]
    assert not rows[8, 20]


@pytest.mark.parametrize("order", range(6))
def test_a_mask_carried_to_its_own_grid_is_itself(order):
    keep = torch.rand(2, *counts(VIDEO, (16, 16)), generator=torch.Generator().manual_seed(order)) < 0.3
    keep |= guards(VIDEO, (16, 16))
    assert torch.equal(carried(keep, VIDEO, VIDEO, order, (16, 16)), keep)


@pytest.mark.parametrize("masked", ["no", "bool", "float"])
def test_blocks_above_a_threshold(masked):
    """Exactly those that hold a probability of that share of the largest of its row, of any sample."""
    draw = torch.Generator().manual_seed(0)
    q, k = (2 * torch.randn(2, 2, 50, 8, generator=draw) for _ in range(2))
    index = torch.stack([torch.randperm(50, generator=draw) for _ in range(2)])
    mask = None if masked == "no" else torch.rand(2, 1, 50, 50, generator=draw) > 0.4
    scores = q.double() @ k.double().mT * 0.7
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
        mask = mask if masked == "bool" else torch.zeros(2, 1, 50, 50).masked_fill(~mask, -torch.inf)
    guard = torch.zeros(13, 9, dtype=torch.bool)
    guard[3] = True
    p = scores.softmax(-1)
    near = p >= 0.5 * p.amax(-1, keepdim=True)
    found = above(q, k, index, guard, (4, 6), 0.7, 0.5, mask)
    for h in range(2):
        ordered = near[:, h][:, index[h]][:, :, index[h]]
        for r in range(13):
            for c in range(9):
                expected = guard[r, c] or ordered[:, r * 4 : r * 4 + 4, c * 6 : c * 6 + 6].any()
                assert bool(found[h, r, c]) == bool(expected), (h, r, c)
    assert 0.2 < float(found.float().mean()) < 0.95
    assert above(q, k, None, guard, (4, 6), 0.7, 1e-30).all()

"""Tables: the published values, the nearest entry, the best of several tables."""

import math

import pytest
import torch

from dqtk.numerics.codebook import adaptive_log, bitmod, log_grid, nearest, nf4, span, table, tan_grid
from dqtk.numerics.packing import layout, selector_bits, stored_bytes, unpack
from dqtk.numerics.weight_grid import fit_grid
from dqtk.spec import MSE, AbsMax, Codebook, PerChannel, PerGroup, TensorSpec

# bitsandbytes, NF4; from the appendix of QLoRA (arXiv 2305.14314)
NF4 = [
    *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
]


def test_nf4_is_the_published_table():
    torch.testing.assert_close(table(nf4()), torch.tensor(NF4), atol=1e-6, rtol=0)
    assert nf4().bits == 4
    assert nf4() is nf4()
    assert span(nf4()) == 1.0


def test_bitmod_tables():
    e2m1 = [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert bitmod(4).bits == 4
    assert [set(t) - set(e2m1) for t in bitmod(4).tables] == [{5.0}, {-5.0}, {8.0}, {-8.0}]
    assert all(set(e2m1) < set(t) for t in bitmod(4).tables)
    assert bitmod(3).bits == 3
    assert [set(t) - {-4, -2, -1, 0, 1, 2, 4} for t in bitmod(3).tables] == [{3.0}, {-3.0}, {6.0}, {-6.0}]
    assert [span(bitmod(4), which) for which in range(4)] == [6, 6, 8, 8]


def test_log_grid_is_powers_and_zero():
    assert log_grid(3).tables == ((0.0, 2**-6, 2**-5, 2**-4, 2**-3, 2**-2, 0.5, 1.0),)
    assert log_grid(3).name == "log2"
    values = torch.tensor(log_grid(5, base=1.5).tables[0], dtype=torch.float64)
    assert len(values) == 32
    torch.testing.assert_close(values[2:] / values[1:-1], torch.full((30,), 1.5, dtype=torch.float64))
    assert log_grid(5, base=1.5).name == "log1.5"


def test_adaptive_log_reaches_from_an_octave_to_28():
    form = adaptive_log(4)
    assert len(form.tables) == 16
    least = [values[1] for values in form.tables]
    assert least == sorted(least, reverse=True)
    assert (least[0], least[-1]) == (pytest.approx(0.5), pytest.approx(2.0**-28))


@pytest.mark.parametrize("alpha", [0.3, 1.2, 1.5])
def test_tan_grid_has_equal_steps_of_the_tangent(alpha):
    values = torch.tensor(tan_grid(5, alpha).tables[0], dtype=torch.float64)
    tangents = (alpha * values).tan()
    torch.testing.assert_close(tangents, math.tan(alpha) * torch.arange(32, dtype=torch.float64) / 31)
    steps = values.diff()
    assert bool((steps.diff() < 0).all())  # finer and finer towards 1
    assert (values[0], values[-1]) == (0, 1)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: bitmod(5), r"bitmod: bits must be 3 or 4, got 5\. Use another format"),
        (lambda: log_grid(4, base=1.0), r"log_grid: base must be above 1, got 1\.0\. The usual base is 2"),
        (lambda: tan_grid(4, 1.6), r"tan_grid: alpha must be between 0 and pi / 2, got 1\.6\. The usual value is 1\.2"),
        (lambda: log_grid(1), r"log_grid: bits must be from 2 to 8, got 1\. A table has 4 to 256 values"),
        (lambda: adaptive_log(12), r"adaptive_log: bits must be from 2 to 8, got 12\."),
    ],
)
def test_refused(call, text):
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("form", [nf4(), *(bitmod(b) for b in (3, 4)), log_grid(4), log_grid(8, 1.1)], ids=lambda f: f.name)
def test_nearest_entry_is_the_nearest_of_all(form, seeded):
    for which, values in enumerate(form.tables):
        values = torch.tensor(values)
        y = torch.cat([seeded(500, seed=which) * values[-1] / 2, values, torch.tensor([1e30, -1e30, 0.0, torch.inf, -torch.inf])])
        codes = nearest(y, form, which)
        assert codes.dtype == torch.uint8
        distance = (y[:, None] - values).abs()
        assert torch.equal(distance.gather(1, codes.long()[:, None])[:-2, 0], distance.amin(1)[:-2])
        assert codes[-2:].tolist() == [len(values) - 1, 0]
        middles = (values[1:] + values[:-1]) / 2
        assert torch.equal(nearest(middles, form, which), torch.arange(len(middles), dtype=torch.uint8))  # of two the lower


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("how", [AbsMax(), MSE()], ids=["absmax", "mse"])
def test_every_group_takes_the_best_of_the_four_tables(bits, how, sample):
    w = sample("t4", 24 * 64).view(24, 64)
    form = bitmod(bits)
    grid = fit_grid(w, TensorSpec(format=form, granularity=PerGroup(size=16), range=how))
    alone = [
        fit_grid(w, TensorSpec(format=Codebook(tables=(values,)), granularity=PerGroup(size=16), range=how)).round(w)
        for values in form.tables
    ]
    errors = torch.stack([(y.double() - w).square().view(24, 4, 16).sum(-1) for y in alone])
    chosen = (grid.round(w).double() - w).square().view(24, 4, 16).sum(-1)
    torch.testing.assert_close(chosen, errors.amin(0), rtol=1e-6, atol=0)
    assert torch.equal(errors.gather(0, grid.which[None])[0], errors.amin(0))
    assert grid.which.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("groups", [1, 3, 4, 9])
def test_the_choice_of_tables_is_stored_and_counted(groups, seeded):
    """Two bits a group, in whole bytes for every eight groups of a row."""
    form, n = bitmod(4), 5
    spec = TensorSpec(format=form, granularity=PerGroup(size=8))
    w = seeded(n, 8 * groups)
    grid = fit_grid(w, spec)
    packed = grid.pack(w)
    assert selector_bits(form) == 2
    assert packed.selector.shape == layout(spec, n, 8 * groups)["selector"][0] == (n, 2 * -(-groups // 8))
    assert torch.equal(unpack(packed.selector, 2, groups), grid.which.to(torch.uint8))
    assert stored_bytes(spec, n, 8 * groups) == n * (4 * groups + 2 * groups + 2 * -(-groups // 8))


def test_one_table_needs_no_selector(seeded):
    for granularity in (PerChannel(), PerGroup(size=8)):
        assert fit_grid(seeded(3, 16), TensorSpec(format=nf4(), granularity=granularity)).pack(seeded(3, 16)).selector is None


def test_zero_stays_zero(seeded):
    """All known tables hold 0: what was pruned stays so."""
    w = seeded(4, 32)
    w[:, ::3] = 0
    for form in (nf4(), bitmod(3), bitmod(4), log_grid(4)):
        assert not fit_grid(w, TensorSpec(format=form, granularity=PerGroup(size=8))).round(w)[:, ::3].any()

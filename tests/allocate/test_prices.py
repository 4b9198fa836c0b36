"""What sites cost: bytes as plans count them, BOPs by hand, milliseconds from a table."""

import pytest

import dqtk
from dqtk.allocate.prices import price
from dqtk.costs import Cost, CostTable, LayerShape
from dqtk.recipes import recipe_named

W4A8, W8A16 = (recipe_named(name).main_spec() for name in ("w4a8-rtn", "w8a16"))
SHAPE = LayerShape(weight=(96, 64), input=(10, 64), bias=True)


@pytest.fixture
def site(bare):
    return dqtk.find_sites(bare)[0]


def test_bits_and_bytes_are_those_of_plans(bare, site):
    choice = dqtk.plan(bare, "w4a8-rtn").choices[0]
    assert choice.site == site
    assert price(site, choice.spec, "bytes") == choice.bytes_after
    assert price(site, choice.spec, "bits") == 8 * choice.bytes_after > 4 * site.num_weights
    assert price(site, None, "bits") == 16 * site.num_weights
    assert price(site, None, "bytes") == choice.bytes_before


def test_bops(site):
    calls = {site.id: (SHAPE, SHAPE)}
    products = 2 * 10 * 96 * 64
    assert price(site, W4A8, "bops", calls=calls) == products * 4 * 8
    assert price(site, W8A16, "bops", calls=calls) == products * 8 * 16
    assert price(site, None, "bops", calls=calls) == products * 16 * 16


def test_milliseconds(site):
    costs = (
        Cost(shape=SHAPE, spec=None, kernel="torch", milliseconds=3.0),
        Cost(shape=SHAPE, spec=W4A8, kernel="int8", milliseconds=2.0),
    )
    table = CostTable(dtype="bfloat16", device="cpu", hardware={}, versions={}, costs=costs, calls={site.id: (SHAPE, SHAPE)})
    assert price(site, None, "ms", table=table) == 6.0
    assert price(site, W4A8, "ms", table=table) == 4.0
    with pytest.raises(ValueError, match=r"W8 per channel, A16 must have been measured at 10 x 64 -> 96, got no time for it"):
        price(site, W8A16, "ms", table=table)


def test_what_is_missing_is_said(site):
    with pytest.raises(ValueError, match=r"model:0 must be called in a step for a budget in BOPs, got no call"):
        price(site, None, "bops", calls={})
    with pytest.raises(ValueError, match=r"a budget in ms must come with a cost table, got none\. Write it with dqtk bench"):
        price(site, None, "ms")

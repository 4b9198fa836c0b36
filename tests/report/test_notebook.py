"""What notebooks show: sheets, differences, crops, a slider that is two pictures where no script runs."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest
from PIL import Image

from dqtk.allocate.budget import Budget
from dqtk.allocate.from_plans import Offers
from dqtk.allocate.sensitivity import Sensitivity
from dqtk.plan import Choice, Plan
from dqtk.recipes import of_width
from dqtk.report.notebook import Front, LayerMap, Slider, crop, difference, grid
from dqtk.sites import Site
from dqtk.spec import canonical


def plain(value, size=(8, 6)):
    return Image.new("RGB", size, value)


def test_grid_places_every_picture():
    sheet = grid([plain((i * 40, 0, 0)) for i in range(5)], [f"p{i}" for i in range(5)], columns=3, scale=2)
    assert sheet.size == (3 * 20 - 4, 2 * (12 + 16 + 4) - 4)
    for i in range(5):
        x, y = i % 3 * 20, i // 3 * 32 + 16
        assert {sheet.getpixel((x + dx, y + dy)) for dx in (0, 15) for dy in (0, 11)} == {(i * 40, 0, 0)}
    assert grid([plain("red")], columns=1, scale=1).size == (8, 6)


def test_difference_is_grey_where_pictures_agree():
    a, b = plain((100, 100, 100)), plain((100, 102, 60))
    assert difference(a, a).getcolors() == [(48, (128, 128, 128))]
    assert difference(a, b, gain=8).getcolors() == [(48, (128, 112, 255))]


def test_crop_enlarges_pixels_to_squares():
    array = np.arange(48 * 3, dtype=np.uint8).reshape(6, 8, 3)
    part = np.asarray(crop(Image.fromarray(array), (2, 1, 4, 3), zoom=3))
    assert part.shape == (6, 6, 3)
    assert (part[0:3, 3:6] == array[1, 3]).all()


def test_slider_escapes_and_holds_both_pictures():
    text = Slider(plain("red"), plain("blue"), "<script>", "w4a8")._repr_html_()
    assert text.count("data:image/png;base64,") == 2
    assert "<script>&" not in text
    assert "&lt;script&gt;" in text
    assert text.count("<script>") == 1
    assert "position:absolute" not in text  # side by side until the script has run


def site(path, role):
    return Site(id=f"transformer:{path}", kind="linear", role=role, shape=(64, 64), bias=False)


SITES = [site("blocks.0.q", "self_attn.q"), site("blocks.1.a.q", "self_attn.q"), site("blocks.1.b.q", "self_attn.q")]
SITES += [site("mod", "modulation"), site("<x>.0.up", "ff.up"), site("out", "output_projection")]


def layer_map(low_is_dark=True):
    scores = dict(zip([s.id for s in SITES], (10.0, 40.0, 30.0, 20.0, 50.0, float("inf")), strict=True))
    return LayerMap(SITES, {"<2> bits": scores, "8 bits": {SITES[0].id: 11.4}}, low_is_dark)


def drawn(svg):
    """Hover text -> (colour, left edge) of every cell, and all words."""
    root = ET.fromstring(svg)
    cells = {r[0].text: (r.get("fill"), float(r.get("x"))) for r in root.iter("{http://www.w3.org/2000/svg}rect") if len(r)}
    return cells, [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]


def test_layer_map_has_a_cell_per_role_and_block():
    cells, words = drawn(layer_map()._repr_svg_())
    assert set(cells) == {
        "transformer: blocks.0 self_attn.q: 10",
        "transformer: blocks.0 self_attn.q: 11.4",
        "transformer: blocks.1 self_attn.q: 30",  # the least of two layers
        "transformer: mod modulation: 20",
        "transformer: <x>.0 ff.up: 50",
    }
    assert words[:3] == ["self_attn.q", "ff.up", "modulation"]  # nothing is known of the last layer
    assert words.count("b0") == words.count("b1") == words.count("m") == words.count("<0") == 2
    assert {"<2> bits", "8 bits", "10", "11"} <= set(words)
    left = [
        cells[f"transformer: {block} {role}"][1] for block, role in (("blocks.0", "self_attn.q: 10"), ("mod", "modulation: 20"))
    ]
    assert left[0] < left[1] < cells["transformer: blocks.0 self_attn.q: 11.4"][1]


@pytest.mark.parametrize("low_is_dark", [True, False])
def test_the_darkest_cell_is_the_one_that_matters(low_is_dark):
    cells, _ = drawn(layer_map(low_is_dark)._repr_svg_())
    low, high = (cells[f"transformer: {cell}"][0] for cell in ("blocks.0 self_attn.q: 10", "<x>.0 ff.up: 50"))
    dark, pale = "rgb(179,73,27)", "rgb(243,241,236)"
    assert (low, high) == ((dark, pale) if low_is_dark else (pale, dark))


def test_one_number_has_a_colour():
    cells, _ = drawn(LayerMap(SITES, {"a": {SITES[0].id: 4}})._repr_svg_())
    assert list(cells) == ["transformer: blocks.0 self_attn.q: 4"]


def offers(loss):
    plans = []
    for bits in (2, 4, 8):
        spec = of_width(bits).main_spec()
        plans.append(Plan(recipe=str(bits), components=(), choices=tuple(Choice(site=s, spec=spec, why="") for s in SITES[:3])))
    scores = {(c.site.id, canonical(c.spec)): 10.0 * i + 7 * j for j, plan in enumerate(plans) for i, c in enumerate(plan.choices)}
    found, groups = Sensitivity(scores=scores, floors={}), dict.fromkeys((s.id for s in SITES), "all")
    return Offers.of(plans, found, Budget(amount=5, unit="bits"), {"all": loss}, groups)


def test_front_draws_both_lines_over_the_budget():
    svg = Front(offers("noise"))._repr_svg_()
    root = ET.fromstring(svg)
    assert svg.count("<polyline") == 2
    _, words = drawn(svg)
    assert {"bits per weight", "a width for each layer", "the best single plan"} <= set(words)
    assert root.get("viewBox") == "0 0 440 304"
    assert repr(Front(offers("noise"))) == "Front(3 plans, 3 layers)"


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: grid([]), r"grid: images must be at least one and of one size, got 0 of sizes \[\]"),
        (lambda: grid([plain("red"), plain("red", (3, 3))]), r"grid: images must be at least one and of one size, got 2 of sizes"),
        (lambda: grid([plain("red")], ["a", "b"]), r"grid: labels must be one per image \(1\), got 2"),
        (
            lambda: LayerMap(SITES, {"a": {"x": 1.0}})._repr_svg_(),
            r"LayerMap: values must hold a finite number of one of the sites",
        ),
        (lambda: Front(offers("score"))._repr_svg_(), r"Front: losses must be noise powers, got \['score'\]"),
        (lambda: difference(plain("red"), plain("red", (3, 3))), r"difference: both pictures must have one size, got \(8, 6\) and"),
    ],
)
def test_what_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()

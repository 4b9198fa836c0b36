"""What notebooks show: sheets, differences, crops, a slider that is two pictures where no script runs."""

import numpy as np
import pytest
from PIL import Image

from dqtk.report.notebook import Slider, crop, difference, grid


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


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: grid([]), r"grid: images must be at least one and of one size, got 0 of sizes \[\]"),
        (lambda: grid([plain("red"), plain("red", (3, 3))]), r"grid: images must be at least one and of one size, got 2 of sizes"),
        (lambda: grid([plain("red")], ["a", "b"]), r"grid: labels must be one per image \(1\), got 2"),
        (lambda: difference(plain("red"), plain("red", (3, 3))), r"difference: both pictures must have one size, got \(8, 6\) and"),
    ],
)
def test_what_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()

"""The contract: what images and texts are refused, and what an extractor may not return."""

from types import SimpleNamespace

import PIL
import pytest
import torch
from dqtk.metrics.extractors.contract import Extractor, ImageTextEncoder, as_images, as_texts, checked_heads, checked_rows, identity


def extractor(rows, dim=4):
    """One that returns ``rows`` whatever it gets."""
    fixed = {
        "version": "1",
        "source": "memory",
        "sha256": "0" * 64,
        "config_sha256": "",
        "comparable": False,
        "preprocess": "none",
        "dim": dim,
    }
    return SimpleNamespace(name="test/fixed", encode_images=lambda images: rows, **fixed)


def images(num=3):
    return torch.zeros(num, 3, 8, 8, dtype=torch.uint8)


def test_good_images_pass_untouched():
    x = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8).permute(0, 3, 1, 2)  # not contiguous
    assert as_images("fid", x) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_floats_are_refused_with_the_reason(dtype):
    with pytest.raises(
        ValueError, match=r"fid: images must be uint8, got torch\.\w+\. Floats do not say whether .* convert once, .*"
    ):
        as_images("fid", torch.zeros(1, 3, 8, 8, dtype=dtype))


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), r"must be uint8, got torch\.int64\. Convert it to uint8\."),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), r"must be \[B, 3, H, W\] and not empty, got \[3, 8, 8\]\. Add a batch axis"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), r"must be .*, got \[1, 8, 8, 3\]\. .*put channels second"),
        (torch.zeros(0, 3, 8, 8, dtype=torch.uint8), r"must be .* not empty, got \[0, 3, 8, 8\]"),
        ([[0]], r"must be a torch tensor, got list"),
    ],
)
def test_other_images_are_refused(x, text):
    with pytest.raises(ValueError, match=f"^fid: images {text}"):
        as_images("fid", x)


@pytest.mark.parametrize("texts", ["a red circle", [], ["a", None]])
def test_other_texts_are_refused(texts):
    with pytest.raises(ValueError, match="clip: texts must be a list of strings and not empty, got"):
        as_texts("clip", texts)


def test_texts_may_be_empty_strings_and_tuples():
    assert as_texts("clip", ("", "b")) == ["", "b"]


def test_rows_come_back():
    rows = torch.arange(12.0).reshape(3, 4)
    assert checked_rows(extractor(rows), images()) is rows


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(2, 4), torch.zeros(4, 4), torch.zeros(3, 5), torch.zeros(3, 4, 1), torch.zeros(3, 4, dtype=torch.float16)],
)
def test_another_number_of_rows_width_or_dtype_is_refused(rows):
    with pytest.raises(ValueError, match=r"test/fixed: features must be float32 \[3, 4\], one row per image, got torch\.float"):
        checked_rows(extractor(rows), images())


def test_nan_names_the_row():
    rows = torch.zeros(3, 4)
    rows[1, 2], rows[2, 0] = float("nan"), float("inf")
    with pytest.raises(ValueError, match="must be finite, got NaN or infinity in 2 of 3 rows, first in row 1"):
        checked_rows(extractor(rows), images())


def test_protocols_tell_extractors_apart():
    assert isinstance(extractor(None), Extractor)
    assert not isinstance(extractor(None), ImageTextEncoder)
    assert not isinstance(torch.nn.Identity(), Extractor)


def test_identity_holds_what_moves_the_numbers():
    """Weights alone do not: the same ones under another configuration, or on another device, give other features."""
    plain = extractor(None)
    said = {identity(plain)}
    for change in (
        {"config_sha256": "1"},
        {"version": "2"},
        {"device": torch.device("cuda:1")},
        {"sha256": "f"},
        {"preprocess": "p"},
    ):
        other = extractor(None)
        vars(other).update(change)
        said.add(identity(other))
    assert len(said) == 6
    assert f"torch {torch.__version__}" in identity(plain)
    assert f"Pillow {PIL.__version__}" in identity(plain)


def test_heads_cost_one_pass_where_they_hold_the_own_feature():
    calls = []

    def encode_all(images):
        calls.append(len(images))
        return SimpleNamespace(pool=torch.ones(3, 4), spatial=torch.zeros(3, 7))

    with_all = extractor(torch.zeros(3, 4))
    vars(with_all).update(encode_all=encode_all, head="pool", encode_images=lambda images: pytest.fail("a second pass"))
    found = checked_heads(with_all, images(), ["spatial"])
    assert {name: list(rows.shape) for name, rows in found.items()} == {"features": [3, 4], "spatial": [3, 7]}
    assert calls == [3]
    vars(with_all).update(encode_all=lambda images: SimpleNamespace(pool=torch.ones(3, 4), spatial=torch.full((3, 7), torch.nan)))
    with pytest.raises(ValueError, match="test/fixed, spatial: features must be finite"):
        checked_heads(with_all, images(), ["spatial"])

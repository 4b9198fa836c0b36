"""Attention without the matrix of scores, on every level of the CPU, against float64."""

import pytest
import torch
import torch.nn.functional as F

from dqtk.kernels import attention
from dqtk.native import library

LEVELS = [*(level.name for level in library.LEVELS), "off"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# batch, heads, key heads, queries, keys, channels, channels of values: around the sizes of tiles, panels and blocks
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (2, 3, 3, 49, 130, 72, 72),
    (1, 4, 2, 7, 257, 64, 64),
    (1, 2, 1, 96, 64, 128, 128),
    (2, 2, 2, 5, 3, 8, 24),
    (1, 2, 2, 50, 300, 40, 96),
    (1, 1, 1, 30, 129, 160, 200),
]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact(q, k, v, mask, scale):
    heads = q.shape[1] // k.shape[1]
    k, v = (t.double().repeat_interleave(heads, dim=1) for t in (k, v))
    scores = q.double() @ k.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return scores.softmax(-1).nan_to_num(0.0) @ v


def inputs(shape, dtype):
    b, h, g, queries, keys, d, e = shape
    q, k, v = seeded(b, queries, h, d), seeded(b, keys, g, d, seed=1), seeded(b, keys, g, e, seed=2)
    return [t.to(dtype).transpose(1, 2) for t in (q, k, v)]  # as projections give them


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64(level, dtype, native_level):
    native_level(level)
    for shape in SHAPES:
        q, k, v = inputs(shape, dtype)
        for scale in (q.shape[-1] ** -0.5, 0.5):
            y = attention(q, k, v, None, scale)
            assert y.dtype == dtype
            assert y.transpose(1, 2).is_contiguous()
            torch.testing.assert_close(y.double(), exact(q, k, v, None, scale), rtol=TOLERANCE[dtype], atol=3 * TOLERANCE[dtype])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_masks(level, dtype, native_level):
    """Boolean and added, of every shape that broadcasts; keys that nobody sees, and queries that see nothing."""
    native_level(level)
    q, k, v = inputs((2, 3, 3, 50, 150, 24, 40), dtype)
    kept = seeded(2, 1, 1, 150, seed=5) > -0.5
    every = seeded(2, 3, 50, 150, seed=6) > 0
    every[0, 1, 7], every[1, :, :, 128:] = False, False
    masks = [
        kept,
        every,
        torch.zeros(150).masked_fill(~kept[0, 0, 0], -10000.0),
        seeded(1, 3, 50, 1),
        seeded(2, 1, 50, 150).mT.contiguous().mT,
    ]
    for mask in masks:
        y = attention(q, k, v, mask, 0.3)
        torch.testing.assert_close(y.double(), exact(q, k, v, mask, 0.3), rtol=TOLERANCE[dtype], atol=3 * TOLERANCE[dtype])
    assert (attention(q, k, v, every, 0.3)[0, 1, 7] == 0).all()


@pytest.mark.parametrize("level", LEVELS)
def test_large_scores_and_wrong_numbers(level, native_level):
    """Scores of thousands stay finite; NaN shows, and only in the rows that it belongs to."""
    native_level(level)
    q, k, v = inputs((1, 2, 2, 60, 200, 16, 16), torch.float32)
    torch.testing.assert_close(
        attention(100 * q, 100 * k, v, None, 1.0).double(), exact(100 * q, 100 * k, v, None, 1.0), rtol=1e-4, atol=1e-4
    )
    q = q.clone()
    q[0, 1, 9, 3] = torch.nan
    y = attention(q, k, v, None, 0.25)
    assert y[0, 1, 9].isnan().all()
    assert y.isnan().sum() == 16
    k = k.clone()
    k[0, 0, 150, 0] = torch.inf
    assert attention(q, k, v, None, 0.25)[0, 0].isnan().any()


@pytest.mark.parametrize("level", LEVELS)
def test_threads_and_chunks_of_heads_change_nothing(level, native_level):
    native_level(level)
    before = torch.get_num_threads()
    q, k, v = inputs((3, 4, 2, 100, 140, 32, 32), torch.bfloat16)
    try:
        torch.set_num_threads(1)
        one = attention(q, k, v, None, 0.2)
        torch.set_num_threads(2)
        assert torch.equal(attention(q, k, v, None, 0.2), one) or level == "off"
    finally:
        torch.set_num_threads(before)
    for b in range(3):
        for h in range(4):
            alone = attention(
                q[b : b + 1, h : h + 1], k[b : b + 1, h // 2 : h // 2 + 1], v[b : b + 1, h // 2 : h // 2 + 1], None, 0.2
            )
            torch.testing.assert_close(alone[0, 0], one[b, h], rtol=1e-2, atol=1e-2)


def test_gradients_are_torchs():
    q, k, v = inputs((1, 2, 2, 9, 11, 8, 8), torch.float32)
    mine, theirs = ([t.clone().requires_grad_() for t in (q, k, v)] for _ in range(2))
    attention(*mine, None, 0.3).square().sum().backward()
    F.scaled_dot_product_attention(*theirs, scale=0.3).square().sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")  # opcheck's own doing
def test_opcheck():
    for dtype in (torch.float32, torch.float64):
        q, k, v = inputs((1, 2, 1, 9, 11, 8, 8), dtype)
        torch.library.opcheck(attention, (q, k, v, None, 0.3))
        torch.library.opcheck(attention, (q, k, v, torch.ones(11, dtype=torch.bool), 0.3))
    empty = q[:, :, :0]
    assert attention(empty, k, v, None, 1.0).shape == (1, 2, 0, 8)

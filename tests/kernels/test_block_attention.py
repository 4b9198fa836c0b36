"""Attention over live blocks of reordered tokens: against float64, and every level of the CPU against the reference."""

import pytest
import torch
import torch.nn.functional as F

from dqtk.kernels import block_attention, block_attention_reference
from dqtk.native import library
from dqtk.numerics.block_masks import unpack

LEVELS = [*(level.name for level in library.LEVELS), "off"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
# batch, heads, tokens, channels, channels of values, query block, key block
SHAPES = [
    (2, 3, 257, 72, 72, 64, 64),
    (1, 2, 300, 64, 64, 128, 64),
    (1, 2, 513, 128, 96, 64, 128),
    (2, 1, 130, 40, 200, 128, 128),
    (1, 2, 1, 8, 8, 64, 64),
    (1, 1, 100, 24, 24, 16, 16),
    (1, 2, 90, 16, 16, 7, 11),
]
EXACT = (16, 16, "row", "none")


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(shape, dtype):
    b, h, n, d, e, *_ = shape
    return [seeded(b, n, h, size, seed=i).to(dtype).transpose(1, 2) for i, size in enumerate((d, d, e))]  # as projections give them


def packed(bits_HRC):
    """uint8 [H, rows, bytes], least significant bit first."""
    padded = F.pad(bits_HRC.to(torch.uint8), (0, -bits_HRC.shape[2] % 8)).unflatten(2, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(3).to(torch.uint8)


def blocks(shape, density, seed=9):
    """bool [H, rows, columns]: live blocks drawn at random; some rows of blocks see nothing."""
    _, h, n, _, _, block_q, block_k = shape
    return torch.rand(h, -(-n // block_q), -(-n // block_k), generator=torch.Generator().manual_seed(seed)) < density


def orders(shape, seed=4):
    draw = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(shape[2], generator=draw) for _ in range(shape[1])]).to(torch.int32)


def exact(q, k, v, order, live, mask, scale, block_q, block_k):
    """float64, with the whole matrix of scores in the original order."""
    n = q.shape[2]
    seen = torch.ones(1, q.shape[1], n, n, dtype=torch.bool)
    if live is not None:
        new = live.repeat_interleave(block_q, 1).repeat_interleave(block_k, 2)[:, :n, :n]
        place = torch.arange(n).expand(q.shape[1], n) if order is None else order.long().argsort(1)
        seen = torch.stack([s[p][:, p] for s, p in zip(new, place, strict=True)])[None]
    scores = q.double() @ k.double().mT * scale
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask.double()
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0) @ v.double()


def close(y, expected, dtype):
    torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=3 * TOLERANCE[dtype])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_16_bits_equal_float64(level, dtype, native_level):
    native_level(level)
    for shape in SHAPES:
        q, k, v = inputs(shape, dtype)
        scale = q.shape[-1] ** -0.5
        for density in (1.0, 0.4):
            for order in (None, orders(shape)):
                live = blocks(shape, density)
                y = block_attention(q, k, v, order, packed(live), None, *shape[5:], scale, *EXACT)
                assert y.dtype == dtype
                assert y.transpose(1, 2).is_contiguous()
                close(y, exact(q, k, v, order, live, None, scale, *shape[5:]), dtype)
        y = block_attention(q, k, v, orders(shape), None, None, *shape[5:], scale, *EXACT)
        close(y, exact(q, k, v, None, None, None, scale, *shape[5:]), dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", [16, 8])
def test_a_permuted_call_equals_the_plain_one(level, bits, native_level):
    """Rows that lie in the new order, without an order: the same numbers in other places."""
    native_level(level)
    for dtype in DTYPES[:2]:
        shape = SHAPES[0]
        q, k, v = inputs(shape, dtype)
        order, live = orders(shape), packed(blocks(shape, 0.5))
        rows = order.long()[None, :, :, None].expand(shape[0], -1, -1, shape[3])
        moved = [t.gather(2, rows) for t in (q, k, v)]
        arguments = live, None, *shape[5:], 0.2, bits, bits, "row", "none" if bits == 16 else "k"
        plain = block_attention(*moved, None, *arguments)
        assert torch.equal(block_attention(q, k, v, order, *arguments).gather(2, rows), plain)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_masks_are_in_the_original_order(level, dtype, native_level):
    """Boolean and added, of every shape that broadcasts; keys that nobody sees, queries that see nothing, before the softmax."""
    native_level(level)
    shape = (2, 3, 200, 24, 40, 64, 64)
    q, k, v = inputs(shape, dtype)
    n = shape[2]
    kept = seeded(2, 1, 1, n, seed=5) > -0.5
    every = seeded(2, 3, n, n, seed=6) > 0
    every[0, 1, 7], every[1, :, :, 128:] = False, False
    masks = [
        kept,
        every,
        torch.zeros(n).masked_fill(~kept[0, 0, 0], -10000.0),
        torch.zeros(n, n).masked_fill(~every[0, 1], -torch.inf).to(dtype),
        seeded(1, 3, n, 1),
        seeded(2, 1, n, n).mT.contiguous().mT,
    ]
    live = blocks(shape, 0.6)
    live[0, 1] = False
    for mask in masks:
        for order in (None, orders(shape)):
            y = block_attention(q, k, v, order, packed(live), mask, 64, 64, 0.3, *EXACT)
            close(y, exact(q, k, v, order, live, mask, 0.3, 64, 64), dtype)
    dead = orders(shape)[0, 64:128].long()
    assert (y[:, 0, dead] == 0).all()


@pytest.mark.parametrize("level", LEVELS)
def test_text_first(level, native_level):
    """Tokens that never move and blocks that are always live, beside a mask of padded text."""
    native_level(level)
    text, shape = 70, (1, 2, 326, 64, 64, 64, 64)
    q, k, v = inputs(shape, torch.float32)
    order = torch.cat([torch.arange(text, dtype=torch.int32).expand(2, -1), text + orders((1, 2, 326 - text))], dim=1)
    live = blocks(shape, 0.3)
    live[:, :2], live[:, :, :2] = True, True
    mask = torch.ones(1, 1, 1, 326, dtype=torch.bool)
    mask[..., 50:text] = False
    y = block_attention(q, k, v, order, packed(live), mask, 64, 64, 0.125, *EXACT)
    close(y, exact(q, k, v, order, live, mask, 0.125, 64, 64), torch.float32)


# Integer products are exact. Results differ by the rounding of floats, and where that moves a probability over the middle between
# two codes: in few rows, by about a code.
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [(8, 16), (16, 8), (8, 8), (4, 4), (8, 4)])
def test_integers_equal_the_reference(level, dtype, bits, native_level):
    native_level(level)
    for shape in SHAPES:
        q, k, v = inputs(shape, dtype)
        k = k + 2 * seeded(shape[3], seed=8).to(dtype)
        for smooth in ("none", "k", "qk"):
            arguments = orders(shape), packed(blocks(shape, 0.5)), None, *shape[5:], 0.15, *bits, "row", smooth
            y, expected = block_attention(q, k, v, *arguments), block_attention_reference(q, k, v, *arguments)
            assert y.dtype == dtype
            difference = (y.float() - expected.float()).abs()
            moved = (difference > TOLERANCE[dtype] * (1 + expected.float().abs())).any(-1)
            if bits[1] == 16:
                assert not moved.any()
            else:
                assert moved.float().mean() < 0.03
                assert difference.max() < 2 / (2 ** bits[1] - 1) * v.float().abs().max()


def local_head(n, d):
    """Queries that look at near keys, as heads of video and pictures do once their tokens are in order; some are diffuse."""
    place = torch.linspace(0, 6, n)[:, None] * torch.linspace(0.2, 3, d // 2)
    waves = torch.cat([place.sin(), place.cos()], dim=1)
    q, k = ((2.5 * waves + 0.3 * seeded(n, d, seed=i))[None, None] for i in range(2))
    return q, k, seeded(1, 1, n, d, seed=2)


@pytest.mark.parametrize("bits", [8, 4])
def test_error_of_rounded_probabilities(bits):
    q, k, v = local_head(512, 64)
    exactly = exact(q, k, v, None, None, None, 0.125, 64, 64)
    error = {}
    for mode in ("row", "tile", "static", *(["fp8"] if bits == 8 else [])):
        y = block_attention(q, k, v, None, None, None, 64, 64, 0.125, 16, bits, mode, "none")
        whole = block_attention(q, k, v, None, None, None, 64, 64, 0.125, 16, 16, mode, "none")
        torch.testing.assert_close(whole.double(), exactly, rtol=1e-5, atol=1e-5)
        error[mode] = (y - exactly).norm() / exactly.norm()
    assert error["row"] < error["tile"] < error["static"]
    if bits == 8:
        assert error["row"] < error["fp8"] < 0.05


def test_numbers_of_8_bits_by_hand():
    """E4M3: three bits of mantissa. 448 of the largest probability, and the nearest of the other."""
    q, k, v = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, -0.55])
    q, k, v = (t.view(1, 1, 2, 1) for t in (q, k, v))
    y = block_attention(q, k, v, None, None, None, 2, 2, 1.0, 16, 8, "fp8", "none")
    p = torch.tensor([448.0, 160.0]) / 448  # exp(-1) * 448 = 164.8, between 160 and 176
    values = torch.tensor([448.0, -240.0]) / 448  # 0.55 * 448 = 246.4, between 240 and 256
    expected = [(p @ values / (1 + (-torch.ones(())).exp())), values.mean()]
    torch.testing.assert_close(y.view(2), torch.stack(expected))


def test_smoothing_keeps_channels_with_an_offset():
    """4-bit codes of keys with large means, then queries of blocks with large means."""
    q, k, v = inputs((1, 2, 256, 64, 64), torch.float32)
    far = 8 * seeded(64, seed=7)
    plain = exact(q + far, k + far, v, None, None, None, 0.125, 64, 64)
    error = {}
    for smooth in ("none", "k", "qk"):
        y = block_attention(q + far, k + far, v, None, None, None, 64, 64, 0.125, 4, 16, "row", smooth)
        error[smooth] = (y - plain).norm()
    assert error["qk"] < error["k"] < error["none"]


def test_codes_by_hand():
    """Two tokens, one block: codes 127 and 64 of keys and queries, 255 of the larger probability."""
    q, k, v = torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.5]), torch.tensor([1.0, -0.5])
    q, k, v = (t.view(1, 1, 2, 1) for t in (q, k, v))
    y = block_attention_reference(q, k, v, None, None, None, 2, 2, 2.0, 8, 8, "row", "none")
    scores = 2 * torch.tensor([127.0, 64.0]).outer(torch.tensor([127.0, 64.0])) / 127**2
    p = (scores - scores[:, :1]).exp()
    codes = (p * 255).round() / 255
    expected = (codes @ torch.tensor([1.0, -64 / 127])) / p.sum(1)
    torch.testing.assert_close(y.view(2), expected)


@pytest.mark.parametrize("level", LEVELS)
def test_threads_change_nothing(level, native_level):
    native_level(level)
    before, shape = torch.get_num_threads(), SHAPES[0]
    q, k, v = inputs(shape, torch.bfloat16)
    for bits in (16, 8):
        arguments = orders(shape), packed(blocks(shape, 0.5)), None, *shape[5:], 0.2, bits, bits, "row", "none"
        try:
            torch.set_num_threads(1)
            one = block_attention(q, k, v, *arguments)
            torch.set_num_threads(2)
            assert torch.equal(block_attention(q, k, v, *arguments), one) or level == "off"
        finally:
            torch.set_num_threads(before)


def test_no_matrix_of_scores(peak_memory):
    """16384 tokens of a head: a matrix of scores would take a GiB."""
    q, k, v = inputs((1, 1, 16384, 16, 16), torch.bfloat16)
    live = torch.zeros(1, 128, 16, dtype=torch.uint8)
    live[:, :, 3] = 6
    for bits, block in ((16, 128), (8, 128)):
        used = peak_memory(
            lambda bits=bits, block=block: block_attention(q, k, v, None, live, None, block, block, 0.25, bits, bits, "row", "k")
        )
        assert used < 64 << 20


def test_wrong_arguments():
    shape = (1, 2, 100, 8, 8)
    q, k, v = inputs(shape, torch.float32)
    fine = {"order": orders(shape), "live": packed(blocks((*shape, 64, 64), 0.5)), "mask": None, "block_q": 64, "block_k": 64}
    fine |= {"scale": 0.3, "qk_bits": 16, "pv_bits": 16, "pv_mode": "row", "smooth": "none"}
    twice = fine["order"].clone()
    twice[0, 1] = twice[0, 0]
    wrong = {
        r"order must be int32 \[2, 100\], got int64 \[2, 100\]": {"order": fine["order"].long()},
        r"order must be a permutation of the 100 tokens in every row, got numbers from 0 to 100": {
            "order": fine["order"] + 1 - (fine["order"] == 0).int()
        },
        r"order must be a permutation .* some of them twice": {"order": twice},
        r"live must be uint8 \[2, 2, 1\], got uint8 \[2, 1, 1\]. A bit for each of the 2 key blocks": {"live": fine["live"][:, :1]},
        r"mask must be bool or float, broadcastable to \[1, 2, 100, 100\], got int64 \[100\]": {"mask": torch.ones(100).long()},
        r"mask must be .*, got bool \[3, 1, 1, 100\]": {"mask": torch.ones(3, 1, 1, 100, dtype=torch.bool)},
        r"block_k must be positive, got 0": {"block_k": 0},
        r"qk_bits must be one of \[16, 8, 4\], got 6. 16 rounds nothing": {"qk_bits": 6},
        r"pv_mode must be one of \['row', 'tile', 'static', 'fp8'\], got 'rows'": {"pv_mode": "rows"},
        r"pv_bits must be 8 with pv_mode fp8, got 4": {"pv_mode": "fp8", "pv_bits": 4},
        r"smooth must be one of \['none', 'k', 'qk'\], got 'q'": {"smooth": "q"},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match="block_attention: " + message):
            block_attention(q, k, v, **fine | change)
    with pytest.raises(ValueError, match=r"q, k and v must be .* Repeat the heads of keys that several share"):
        block_attention(q, k[:, :1], v[:, :1], **fine)
    with pytest.raises(
        ValueError, match="dtypes of q, k and v must be one of float32, bfloat16, float16, got float32, bfloat16, float32"
    ):
        block_attention(q, k.bfloat16(), v, **fine)


def test_bits_of_blocks():
    bits = blocks((1, 2, 640, 1, 1, 64, 64), 0.5)
    assert torch.equal(unpack(packed(bits), 10), bits)
    assert unpack(torch.tensor([[[2, 1]]], dtype=torch.uint8), 9).nonzero()[:, 2].tolist() == [1, 8]


def test_opcheck():
    shape = (1, 2, 100, 8, 8, 64, 64)
    q, k, v = inputs(shape, torch.bfloat16)
    for arguments in (EXACT, (8, 8, "row", "k")):
        call = q, k, v, orders(shape), packed(blocks(shape, 0.5)), torch.ones(100, dtype=torch.bool), 64, 64, 0.3, *arguments
        torch.library.opcheck(block_attention, call)
    empty = q[:, :, :0], k[:, :, :0], v[:, :, :0]
    assert block_attention(*empty, None, None, None, 64, 64, 1.0, *EXACT).shape == (1, 2, 0, 8)

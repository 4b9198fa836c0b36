"""Hadamard matrices by their defining identities, and rotations against the dense product in float64."""

import pytest
import torch
from torch.nn.functional import linear

from dqtk.numerics.hadamard import (
    block_size,
    hadamard_matrix,
    pack_signs,
    random_signs,
    regular_hadamard,
    rotate,
    unpack_signs,
    unrotate,
)

SMALL = [1, 2, 4, 8, 12, 20, 28, 36, 44, 76, 96, 104, 108, 140, 148, 192, 200, 320, 640, 768, 1152]
LARGE = [1280, 1536, 1920, 2048, 2240, 2304, 2432, 3072, 3584, 4608, 5120, 8960, 12288, 13824, 15360, 18944]
BLOCKS = [
    (96, 96, False),
    (96, 12, False),
    (96, 8, False),
    (128, 64, True),
    (128, 16, True),
    (144, 36, False),
    (40, 1, False),
    (6, 2, False),
]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense(width, signs, block, regular):
    """The rotation as one float64 [K, K] matrix."""
    h = regular_hadamard(block) if regular else hadamard_matrix(block)
    return signs.double()[:, None] * torch.block_diag(*[h] * (width // block)) / block**0.5


def incoherence(x):
    return (x.abs().amax() / x.square().mean().sqrt()).item()


@pytest.mark.parametrize("order", SMALL)
def test_matrix_is_hadamard(order):
    h = hadamard_matrix(order)
    assert h.dtype == torch.float64
    assert torch.equal(h.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.float64))


def test_matrices_are_built_as_the_docstring_says():
    """Smallest base, Kronecker times Sylvester. Checkpoints hold weights rotated by exactly these."""
    s = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    assert torch.equal(hadamard_matrix(4), torch.kron(s, s))
    assert torch.equal(hadamard_matrix(24), torch.kron(hadamard_matrix(12), s))
    assert torch.equal(hadamard_matrix(2 * 36), torch.kron(hadamard_matrix(36), s))
    signed = ["".join("+" if value > 0 else "-" for value in row) for row in hadamard_matrix(12).tolist()[:3]]
    assert signed == ["++++++++++++", "-+-+---+++-+", "-++-+---+++-"]
    signed = ["".join("+" if value > 0 else "-" for value in row) for row in hadamard_matrix(36).tolist()[:3]]
    assert signed == [
        "+-++++++++++++++++++++++++++++++++++",
        "--+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-",
        "+++-++++--++------++++------++--++++",
    ]


def test_a_returned_matrix_is_the_callers_own():
    x, signs = randn(2, 8), random_signs(8, 0)
    before = rotate(x, signs, 8)
    hadamard_matrix(8).zero_()
    assert torch.equal(rotate(x, signs, 8), before)


@pytest.mark.parametrize("order", [4**k for k in range(6)])
def test_regular_matrix(order):
    h = regular_hadamard(order)
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.float64))
    assert torch.equal(h, h.T)
    assert torch.equal(h.sum(1), torch.full((order,), order**0.5, dtype=torch.float64))
    if order > 1:
        assert h.sum(0).abs().max() < order


@pytest.mark.parametrize("order", [0, -4, 3, 6, 7, 10, 52, 92, 172, 11008])
def test_no_matrix(order):
    with pytest.raises(ValueError, match=rf"hadamard_matrix: order must be 1, 2 or a multiple of 4 .* got {order}\. .*block_size"):
        hadamard_matrix(order)


@pytest.mark.parametrize("order", [0, 2, 8, 12, 32])
def test_no_regular_matrix(order):
    with pytest.raises(ValueError, match=rf"regular_hadamard: order must be a power of 4, got {order}\. .*regular=True"):
        regular_hadamard(order)


@pytest.mark.parametrize("width", [width for width in SMALL + LARGE if width >= 4])
def test_a_whole_width_is_one_block(width):
    """Exactly orthogonal: the first, last and some other unit vectors, by the fast path, have inner products of a unit matrix."""
    assert block_size(width) == width
    signs = random_signs(width, seed=width)
    picks = torch.cat(
        [torch.tensor([0, width - 1]), torch.randperm(width, generator=torch.Generator().manual_seed(0))[:30]]
    ).unique()
    rows = torch.zeros(len(picks), width, dtype=torch.float64)
    rows[torch.arange(len(picks)), picks] = 1
    y = rotate(rows, signs, width)
    torch.testing.assert_close(y.abs(), torch.full_like(y, width**-0.5), rtol=1e-15, atol=0)
    codes = y.sign()
    assert torch.equal(codes @ codes.T, width * torch.eye(len(picks), dtype=torch.float64))
    torch.testing.assert_close(unrotate(y, signs, width), rows, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("width", "options", "expected"),
    [
        (1152, {}, 1152),
        (1152, {"regular": True}, 64),
        (1152, {"most": 256}, 192),
        (3072, {"regular": True}, 1024),
        (3072, {"regular": True, "most": 256}, 256),
        (3072, {"regular": True, "most": 255}, 64),
        (5120, {"most": 10**9}, 5120),
        (11008, {}, 256),  # 43 has no base below 5504
        (52, {}, 4),
        (12, {"regular": True}, 4),
        (4, {}, 4),
    ],
)
def test_block_size(width, options, expected):
    assert block_size(width, **options) == expected


@pytest.mark.parametrize("width", [0, 1, 2, 10, 49, 1154])
def test_no_block_of_one_or_two(width):
    for regular in (False, True):
        message = rf"block_size: width must be a positive multiple of 4, got {width}\. Leave this layer unrotated"
        with pytest.raises(ValueError, match=message):
            block_size(width, regular)


def test_most_below_four():
    with pytest.raises(ValueError, match=r"block_size: most must be at least 4, got 3\. Leave"):
        block_size(96, most=3)


@pytest.mark.parametrize(("width", "block", "regular"), BLOCKS)
def test_rotate_is_the_dense_product(width, block, regular):
    x, signs = randn(3, 5, width), random_signs(width, 1)
    r = dense(width, signs, block, regular)
    torch.testing.assert_close(r @ r.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(rotate(x, signs, block, regular), x @ r, rtol=0, atol=1e-13)
    torch.testing.assert_close(unrotate(x, signs, block, regular), x @ r.T, rtol=0, atol=1e-13)


@pytest.mark.parametrize("width", [320, 768, 1152, 2432])
def test_rotate_is_the_dense_product_at_full_width(width):
    x, signs = randn(4, width), random_signs(width, 1)
    torch.testing.assert_close(rotate(x, signs, width), x @ dense(width, signs, width, False), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("width", "block", "regular"), BLOCKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6)], ids=str)
def test_inverse(width, block, regular, dtype, tolerance):
    x, signs = randn(7, width, dtype=dtype), random_signs(width, 2)
    torch.testing.assert_close(unrotate(rotate(x, signs, block, regular), signs, block, regular), x, rtol=0, atol=tolerance)
    torch.testing.assert_close(rotate(unrotate(x, signs, block, regular), signs, block, regular), x, rtol=0, atol=tolerance)


def test_a_linear_layer_does_not_notice():
    """x W^T = (x R)(W R)^T, the point of it all."""
    x, w, signs = randn(9, 1152), randn(40, 1152, seed=1), random_signs(1152, 3)
    for block, regular in ((1152, False), (192, False), (64, True)):
        y = linear(rotate(x, signs, block, regular), rotate(w, signs, block, regular))
        torch.testing.assert_close(y, linear(x, w), rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [rotate, unrotate])
def test_half_precision_is_computed_in_float32(function, dtype):
    """One rounding, at the end; norms stay."""
    x, signs = randn(16, 1152, dtype=dtype), random_signs(1152, 4)
    y = function(x, signs, 1152)
    assert y.dtype == dtype
    assert torch.equal(y, function(x.float(), signs, 1152).to(dtype))
    torch.testing.assert_close(y.double().norm(dim=1), x.double().norm(dim=1), rtol=2e-4, atol=0)


def test_autocast_does_not_lower_the_precision():
    x, signs = randn(4, 96, dtype=torch.float32), random_signs(96, 0)
    with torch.autocast("cpu", torch.bfloat16):
        y, z = rotate(x, signs, 96), unrotate(x, signs, 96)
    assert torch.equal(y, rotate(x, signs, 96))
    assert torch.equal(z, unrotate(x, signs, 96))


@pytest.mark.parametrize(("block", "regular"), [(1152, False), (144, False), (64, True)])
def test_outliers_are_spread(block, regular):
    """One channel 40 times the others: a block shares it, so max / rms falls towards that of Gaussian rows."""
    x = randn(256, 1152)
    x[:, 77] *= 40
    y = rotate(x, random_signs(1152, 5), block, regular)
    assert incoherence(x) > 40
    assert incoherence(y) < incoherence(x) * (0.2 if block == 1152 else 0.65)


def test_signs_and_regular_matrices_spare_the_mean():
    """Rows of one value: a bare Sylvester matrix puts all of it into one feature (64^0.5 times the rms), the remedies do not."""
    x, plus = torch.ones(1, 64, dtype=torch.float64), torch.ones(64, dtype=torch.int8)
    assert incoherence(rotate(x, plus, 64)) == pytest.approx(8)
    assert incoherence(rotate(x, plus, 64, regular=True)) == pytest.approx(1)
    assert incoherence(rotate(x, random_signs(64, 0), 64)) < 4


@pytest.mark.parametrize("function", [rotate, unrotate])
def test_odd_inputs(function):
    signs = random_signs(48, 0)
    x = randn(48, 6, 2)
    y = function(x.movedim(0, -1).contiguous(), signs, 12)
    torch.testing.assert_close(function(x.movedim(0, -1), signs, 12), y)
    torch.testing.assert_close(function(x[:, 3, 1], signs, 12), y[3, 1])
    torch.testing.assert_close(function(y[0], signs.double(), 12), function(y[0], signs, 12))
    for shape in ((0, 48), (2, 0, 48)):
        assert function(torch.empty(shape), signs, 12).shape == shape
    meta = function(torch.empty(3, 48, device="meta", dtype=torch.bfloat16), signs.to("meta"), 12)
    assert (meta.shape, meta.dtype, meta.device.type) == ((3, 48), torch.bfloat16, "meta")


def test_matrices_do_not_depend_on_where_they_were_first_needed():
    """First use under inference mode or a default device of "meta" must not poison the cache. No other test uses order 380."""
    signs = random_signs(380, 0)
    with torch.inference_mode(), torch.device("meta"):
        y = rotate(torch.ones(1, 380, dtype=torch.float64, device="cpu"), signs, 380)
        assert random_signs(8, 0).device.type == "cpu"
    x = torch.ones(1, 380, dtype=torch.float64, requires_grad=True)
    assert torch.equal(rotate(x, signs, 380), y)
    rotate(x, signs, 380).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


@pytest.mark.parametrize("function", [rotate, unrotate])
def test_gradients(function):
    x = randn(2, 24).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, random_signs(24, 0), 12), (x,))


@pytest.mark.parametrize("dynamic", [None, True])
def test_full_graph(dynamic):
    def both(x, signs, block, regular):
        return rotate(x, signs, block, regular), unrotate(x, signs, block, regular)

    torch.compiler.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for block, regular in ((96, False), (16, True)):  # with ``dynamic`` the block is a symbol
        for rows, dtype in ((2, torch.float32), (3, torch.bfloat16)):
            x, signs = randn(rows, 96 * 2, dtype=dtype), random_signs(96 * 2, 0)
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            results, expected = compiled(a, signs, block, regular), both(b, signs, block, regular)
            for result, value in zip(results, expected, strict=True):
                torch.testing.assert_close(result, value)
            sum(y.float().square().sum() for y in results).backward()
            sum(y.float().square().sum() for y in expected).backward()
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize(("name", "function"), [("rotate", rotate), ("unrotate", unrotate)])
def test_rotation_errors(name, function):
    x, signs = torch.randn(2, 96), random_signs(96, 0)
    for block in (36, 0, -12, 192):
        with pytest.raises(ValueError, match=rf"{name}: block must divide the 96 features of x, got {block}\. Use block_size"):
            function(x, signs, block)
    with pytest.raises(ValueError, match=r"hadamard_matrix: order must be .* got 3\."):
        function(x, signs, 3)
    with pytest.raises(ValueError, match=r"regular_hadamard: order must be a power of 4, got 32\."):
        function(x, signs, 32, regular=True)
    with pytest.raises(ValueError, match=rf"{name}: x must be floating, got torch.int8\. Decode"):
        function(x.to(torch.int8), signs, 96)
    for wrong in (signs[:-1], signs[None], signs[0]):
        with pytest.raises(ValueError, match=rf"{name}: signs must be one per feature of x \[2, 96\], got .* Use random_signs"):
            function(x, wrong, 96)
    with pytest.raises(ValueError, match=rf"{name}: signs must be one per feature of x \[\], got \[\]"):
        function(x[0, 0], signs[0], 1)


def test_random_signs():
    signs = random_signs(4096, 7)
    assert signs.dtype == torch.int8
    assert torch.equal(signs.abs(), torch.ones_like(signs))
    assert abs(signs.sum(dtype=torch.int64)) < 5 * 64
    state = torch.random.get_rng_state()
    assert torch.equal(random_signs(4096, 7), signs)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(random_signs(4096, 8), signs)
    assert random_signs(8, 0).tolist() == [-1, 1, 1, -1, 1, 1, 1, 1]


@pytest.mark.parametrize("width", [0, 1, 7, 8, 9, 96, 1155])
def test_signs_survive_packing(width):
    signs = random_signs(width, width)
    packed = pack_signs(signs)
    assert packed.dtype == torch.uint8
    assert packed.shape == ((width + 7) // 8,)
    restored = unpack_signs(packed, width)
    assert restored.dtype == torch.int8
    assert torch.equal(restored, signs)
    assert torch.equal(pack_signs(signs.float()), packed)


def test_sign_bytes():
    """The checkpoint format: least bit first, 1 for -1, padded with 0."""
    assert pack_signs(torch.tensor([-1, 1, 1, 1, 1, 1, 1, -1, 1, -1], dtype=torch.int8)).tolist() == [0b10000001, 0b10]
    assert unpack_signs(torch.empty(2, dtype=torch.uint8, device="meta"), 10).shape == (10,)


def test_packing_errors():
    for wrong in (torch.tensor([1, 0, -1]), torch.tensor([2.0]), torch.tensor([float("nan")]), torch.ones(2, 8)):
        with pytest.raises(ValueError, match=r"pack_signs: signs must be a vector of \+1 and -1, got .*\. Use random_signs"):
            pack_signs(wrong)
    for wrong in (torch.zeros(1, dtype=torch.uint8), torch.zeros(2, dtype=torch.int8), torch.zeros(1, 2, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"unpack_signs: packed must be uint8 \[2\] for 9 signs, got .*\. Use what"):
            unpack_signs(wrong, 9)

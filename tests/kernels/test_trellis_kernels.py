"""Trellis codes: the native search and the ops against the reference, bit for bit, at every level that this machine can run."""

import pytest
import torch
import torch.nn.functional as F

from dqtk import native
from dqtk.kernels import (
    decode_trellis,
    decode_trellis_reference,
    encode_trellis,
    linear_trellis,
    on_cpu,
)
from dqtk.kernels import trellis as trellis_kernels
from dqtk.native import library
from dqtk.numerics.trellis import MULTIPLIERS, decode, encode, from_tiles, pack, packed_width, to_tiles
from dqtk.spec.trellis import Trellis

LEVELS = [level.name for level in library.LEVELS]
EVERY = [
    Trellis(state_bits=state_bits, bits=bits, vector=vector)
    for bits, vector in MULTIPLIERS
    for state_bits in (4, 8, 11, 16)
    if state_bits >= bits * vector
]
FEW = [EVERY[0], EVERY[5], EVERY[11], EVERY[-1]]
TILES = [(16, 16), (1, 64), (4, 26), (2, 22), (1, 18)]
SHAPES = [(1, 18), (33, 70), (16, 64), (64, 5)]  # of weights; the last tiles of most reach beyond
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(trellis, n, k, tile, seed=0):
    """Any bits are a ring."""
    count, length = -(-n // tile[0]) * -(-k // tile[1]), tile[0] * tile[1]
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randint(0, 256, (count, packed_width(trellis, length)), dtype=torch.uint8, generator=generator)
    return packed, (*tile, trellis.state_bits, trellis.bits, trellis.vector)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- the search ------------------------------------------------------------------------------------------------------


def test_a_slow_search_says_so_once(environment, capsys):
    trellis, x = Trellis(state_bits=4, bits=2, vector=1), seeded(2, 16)
    trellis_kernels._say_slow.cache_clear()
    environment(DQTK_NATIVE="off")
    states = [encode_trellis(x, trellis) for _ in range(2)]
    said = capsys.readouterr().err
    assert said.startswith("dqtk: trellis codes are found by Viterbi's search through torch, some hundred times slower (")
    assert "switched off by DQTK_NATIVE" in said
    assert said.count("\n") == 1
    assert torch.equal(states[0], encode(x, trellis))


@pytest.mark.parametrize("level", LEVELS)
def test_native_search_finds_the_same_states(level, native_level, threads):
    native_level(level)
    for trellis in EVERY:
        if trellis.state_bits == 16:
            continue
        threads(2 if trellis.state_bits == 8 else 1)
        x, weight = seeded(3, 26, seed=1), seeded(3, 26, seed=2).square()
        for w in (None, weight[0], weight.index_fill(1, torch.tensor([3]), 0.0)):
            assert torch.equal(encode_trellis(x, trellis, weight=w), encode(x, trellis, weight=w)), trellis


def test_native_search_takes_what_the_reference_takes(native_level):
    native_level("")
    trellis, x = Trellis(state_bits=8), seeded(4, 20)
    for rows in (x[:0], x[:1], x.bfloat16(), x.double(), x.T.contiguous().T, x[:, ::2], x[::2], torch.zeros(2, 9), x * 1e30):
        assert torch.equal(encode_trellis(rows, trellis), encode(rows, trellis))
    with pytest.raises(ValueError, match="x must be finite, got NaN or infinity"):
        encode_trellis(x * torch.nan, trellis)
    with pytest.raises(ValueError, match=r"weight must be of shape \[T\]"):
        encode_trellis(x, trellis, weight=torch.ones(4))


def test_without_a_native_library_torch_searches(environment):
    environment(DQTK_NATIVE="off")
    x = seeded(2, 12)
    assert torch.equal(encode_trellis(x, Trellis(state_bits=6)), encode(x, Trellis(state_bits=6)))


@pytest.mark.parametrize(("bits", "bound"), [(2, 1.10), (3, 1.15), (4, 1.25)])
def test_longest_states_come_near_the_bound(bits, bound, native_level):
    """Times 2^-2R, the least that any code of R bits loses on Gaussian numbers."""
    native_level("")
    x = seeded(16, 256, seed=3)
    x = x / x.square().mean().sqrt()
    errors = []
    for state_bits in (12, 14, 16):
        trellis = Trellis(state_bits=state_bits, bits=bits)
        errors.append(float((x - decode(encode_trellis(x, trellis), trellis)).square().mean()) * 4.0**bits)
    assert errors == sorted(errors, reverse=True)
    assert 1 < errors[-1] < bound


def test_memory_of_the_search_is_bounded(native_level, peak_memory):
    """Per thread: two rows of costs, and a byte per suffix and step of one row at a time."""
    native_level("")
    trellis, x = Trellis(state_bits=14, bits=2), seeded(20, 128)
    assert peak_memory(lambda: encode_trellis(x, trellis)) < 8 << 20


# --- tiles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_tiles_come_back(n, k, tile):
    weight = seeded(n, k)
    rings = to_tiles(weight, tile)
    assert rings.shape == (-(-n // tile[0]) * -(-k // tile[1]), tile[0] * tile[1])
    assert torch.equal(from_tiles(rings, n, k, tile), weight)
    assert rings.square().sum() == pytest.approx(float(weight.square().sum()))


def test_tiles_are_read_row_by_row():
    weight = torch.arange(24).view(4, 6)
    assert to_tiles(weight, (2, 3)).tolist()[:2] == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    assert to_tiles(weight, (2, 3)).tolist()[2] == [12, 13, 14, 18, 19, 20]


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_decoding_equals_the_reference(level, native_level):
    native_level(level)
    for i, trellis in enumerate(EVERY):
        for j, tile in enumerate(TILES):
            n, k = SHAPES[(i + j) % len(SHAPES)]
            packed, how = stored(trellis, n, k, tile)
            scale, dtype = (None, seeded(n, 1), seeded(1, 1).bfloat16())[i % 3], DTYPES[j % 3]
            expected = decode_trellis_reference(packed, scale, n, k, *how, dtype)
            y = decode_trellis(packed, scale, n, k, *how, dtype)
            assert torch.equal(y, expected), (trellis, tile, n, k, dtype)
            assert y.is_contiguous()


def test_what_was_encoded_is_decoded(native_level):
    native_level("")
    trellis, tile, weight = Trellis(state_bits=10, bits=3), (4, 16), seeded(13, 40)
    scale = weight.square().mean(1, keepdim=True).sqrt()
    states = encode_trellis(to_tiles(weight / scale, tile), trellis)
    y = decode_trellis(pack(states, trellis), scale, 13, 40, *tile, 10, 3, 1, torch.float32)
    assert torch.equal(y, from_tiles(decode(states, trellis), 13, 40, tile) * scale)
    assert (y - weight).square().mean() < 0.06 * weight.square().mean()  # 64 numbers a ring


def test_parts_of_a_weight(built, threads):
    """As layers decode it, from any first row of a tile, by two threads."""
    threads(2)
    trellis, tile = Trellis(state_bits=12, bits=2), (4, 16)
    packed, how = stored(trellis, 402, 520, tile)
    scale = seeded(402, 1)
    whole = decode_trellis(packed, scale, 402, 520, *how, torch.bfloat16)
    decoder = native.trellis_decoder(library.load(), packed, scale, 402, 520, tile, trellis)
    for first, last in ((0, 402), (64, 128), (400, 402), (4, 7)):
        assert torch.equal(decoder.rows(first, torch.empty(last - first, 520, dtype=torch.bfloat16)), whole[first:last])


@pytest.mark.parametrize("trellis", FEW, ids=str)
@pytest.mark.parametrize("shape", [(70,), (2, 70), (0, 70), (2, 3, 70)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_linear(trellis, shape, dtype):
    packed, how = stored(trellis, 33, 70, (16, 16))
    scale, x = seeded(33, 1), seeded(*shape).to(dtype)
    weight = decode_trellis_reference(packed, scale, 33, 70, *how, dtype)
    for bias in (seeded(33), None):
        y = linear_trellis(x, packed, bias, scale, 33, *how)
        assert y.dtype == dtype
        expected = F.linear(x.double(), weight.double(), None if bias is None else bias.to(dtype).double())
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 1e-12}[dtype]
        torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=5 * tolerance)


def test_linear_in_chunks(monkeypatch):
    monkeypatch.setattr(on_cpu, "CHUNK_BYTES", 64 * 70 * 4)
    packed, how = stored(FEW[1], 150, 70, (16, 16))
    x, bias = seeded(5, 70), seeded(150)
    weight = decode_trellis_reference(packed, None, 150, 70, *how, torch.float32)
    torch.testing.assert_close(linear_trellis(x, packed, bias, None, 150, *how), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_the_decoded_layer():
    packed, how = stored(FEW[2], 33, 70, (2, 22))
    weight = decode_trellis_reference(packed, seeded(33, 1), 33, 70, *how, torch.float32)
    leaves = [v.requires_grad_() for v in (seeded(3, 5, 70), seeded(33), seeded(3, 5, 70), seeded(33))]
    linear_trellis(leaves[0], packed, leaves[1], seeded(33, 1), 33, *how).square().sum().backward()
    F.linear(leaves[2], weight, leaves[3]).square().sum().backward()
    for mine, plain in (leaves[::2], leaves[1::2]):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")  # opcheck's own doing
@pytest.mark.parametrize("trellis", FEW[1:3], ids=str)
def test_opcheck(trellis):
    packed, how = stored(trellis, 7, 40, (2, 16))
    for scale in (None, seeded(7, 1)):
        torch.library.opcheck(decode_trellis, (packed, scale, 7, 40, *how, torch.bfloat16))
        x, bias = seeded(2, 3, 40).requires_grad_(), seeded(7).requires_grad_()
        torch.library.opcheck(linear_trellis, (x, packed, bias, scale, 7, *how))


def test_compiles_into_one_graph():
    packed, how = stored(FEW[1], 7, 40, (2, 16))

    def layer(x, packed, scale):
        return F.relu(linear_trellis(x, packed, None, scale, 7, *how)) + decode_trellis(packed, scale, 7, 40, *how, x.dtype).sum()

    x, scale = seeded(3, 40), seeded(7, 1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, packed, scale), layer(x, packed, scale))

"""Trellis codes: the search against all code sequences, the ring, its bytes, and what it loses on Gaussian numbers."""

import hashlib
import itertools

import pytest
import torch

from dqtk.numerics import trellis as module
from dqtk.numerics.trellis import GAIN, MULTIPLIERS, decode, encode, num_steps, pack, packed_width, unpack, values
from dqtk.spec.trellis import Trellis

TINY = [  # L, K, V, T
    (3, 1, 1, 8),
    (4, 1, 1, 5),
    (4, 2, 1, 5),
    (4, 2, 1, 2),
    (5, 3, 1, 3),
    (4, 1, 2, 10),
    (5, 2, 2, 6),
    (4, 4, 1, 3),
    (4, 2, 2, 2),
]
EVERY = [Trellis(state_bits=12, bits=bits, vector=vector) for bits, vector in MULTIPLIERS]


def squared(x, numbers, weight=None):
    error = (x.double() - numbers.double()).square()
    return (error if weight is None else error * weight.double()).sum(-1)


def all_paths(trellis, n, closed):
    """int32 [P, n]: every path of n states, or every ring; by counting bits, not by the code under test."""
    total = n * trellis.step_bits
    history = 0 if closed else trellis.state_bits - trellis.step_bits
    paths = []
    for bits in itertools.product((0, 1), repeat=total + history):
        if closed:
            bits = [*bits] * (trellis.state_bits + 1)
            ends = [len(bits) - total + (t + 1) * trellis.step_bits for t in range(n)]
        else:
            ends = [history + (t + 1) * trellis.step_bits for t in range(n)]
        paths.append([int("".join(map(str, bits[end - trellis.state_bits : end])), 2) for end in ends])
    return torch.tensor(paths, dtype=torch.int32)


def is_ring(states, trellis):
    before = states.roll(1, dims=1) << trellis.step_bits & (trellis.states - 1)
    return bool((states >> trellis.step_bits << trellis.step_bits == before).all())


@pytest.mark.parametrize(("state_bits", "bits", "vector", "length"), TINY)
def test_open_search_finds_the_best_path(state_bits, bits, vector, length, seeded):
    trellis = Trellis(state_bits=state_bits, bits=bits, vector=vector)
    numbers = decode(all_paths(trellis, length // vector, closed=False), trellis)
    x, weight = seeded(20, length, seed=1), seeded(20, length, seed=2).square()
    for w in (None, weight):
        found = squared(x, decode(module._search(x, w, trellis, None), trellis), w)
        best = squared(x[:, None], numbers, None if w is None else w[:, None]).amin(1)
        torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("state_bits", "bits", "vector", "length", "excess"),
    [
        (2, 1, 1, 12, 1.01),
        (3, 1, 1, 13, 1.05),
        (4, 1, 1, 5, 1.8),
        (3, 2, 1, 6, 1.05),
        (4, 2, 1, 6, 1.15),
        (4, 3, 1, 4, 1.05),
        (3, 1, 2, 12, 1.05),
        (4, 2, 2, 6, 1.01),
        (4, 4, 1, 3, 1.01),
    ],
)
def test_closed_search_is_a_ring_near_the_best(state_bits, bits, vector, length, excess, seeded):
    """The shorter the ring beside the state, the more the first search's free ends mislead it."""
    trellis = Trellis(state_bits=state_bits, bits=bits, vector=vector)
    rings = all_paths(trellis, length // vector, closed=True)
    assert is_ring(rings, trellis)
    x = seeded(200, length, seed=3)
    states = encode(x, trellis)
    assert states.shape == (200, length // vector)
    assert states.dtype == torch.int32
    assert is_ring(states, trellis)
    found, best = squared(x, decode(states, trellis)), squared(x[:, None], decode(rings, trellis)).amin(1)
    assert (found >= best * (1 - 1e-5)).all()
    assert found.mean() < excess * best.mean()


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_bound_search_finds_the_best_ring_of_its_seam(bits, seeded):
    trellis = Trellis(state_bits=4, bits=bits)
    rings, last = all_paths(trellis, 8 // bits, closed=True), (trellis.states >> bits) - 1
    x = seeded(3, 8 // bits, seed=4)
    for seam in range(last + 1):
        states = module._search(x, None, trellis, torch.full((3,), seam))
        assert is_ring(states, trellis)
        assert (states[:, -1] & last == seam).all()
        numbers = decode(rings[rings[:, -1] & last == seam], trellis)
        best = squared(x[:, None], numbers).amin(1)
        torch.testing.assert_close(squared(x, decode(states, trellis)), best, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trellis", EVERY, ids=str)
@pytest.mark.parametrize("length", [12, 22, 64])
def test_bits_come_back(trellis, length, seeded):
    states = encode(seeded(3, length, seed=5), trellis)
    packed = pack(states, trellis)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, -(-length * trellis.bits // 8)) == (3, packed_width(trellis, length))
    assert torch.equal(unpack(packed, trellis, length), states)
    empty = length * trellis.bits % 8
    assert not empty or not (packed[:, -1] & (0xFF >> empty)).any()


def test_decoding_compiles_into_one_graph(seeded):
    trellis = Trellis(state_bits=12, bits=2, vector=2)
    packed = pack(encode(seeded(3, 22, seed=5), trellis), trellis)

    def read(packed):
        return decode(unpack(packed, trellis, 22), trellis)

    assert torch.equal(torch.compile(read, fullgraph=True, backend="aot_eager")(packed), read(packed))


def test_bytes_are_the_ring_from_the_highest_bit_on():
    """Frozen: these bytes are in checkpoints."""
    trellis = Trellis(state_bits=4, bits=3)
    ring = "101001110011"  # four steps
    states = [int((ring * 2)[end - 4 : end], 2) for end in (15, 18, 21, 24)]
    packed = pack(torch.tensor([states]), trellis)
    assert packed.tolist() == [[0b10100111, 0b00110000]]
    assert unpack(packed, trellis, 4).tolist() == [states]


def test_values_are_frozen():
    """Every float of every trellis: they are not in checkpoints, so they must never change."""
    found = hashlib.sha256()
    for bits, vector in MULTIPLIERS:
        for state_bits in range(max(2, bits * vector), 17):
            table = values(Trellis(state_bits=state_bits, bits=bits, vector=vector))
            assert table.dtype == torch.float32
            found.update(table.numpy().tobytes())
    assert found.hexdigest() == "cfebaf3214cf3dc623a1119aed8fce82c20a5b9af9f94954a4d44396f6f9d37d"


@pytest.mark.parametrize("trellis", EVERY, ids=str)
def test_values_are_quantiles_of_the_normal_distribution(trellis):
    probability = (torch.arange(trellis.states, dtype=torch.float64) + 0.5) / trellis.states
    quantiles = torch.special.ndtri(probability) * GAIN[trellis.bits]
    for column in values(trellis).double().unbind(1):
        ordered = column.sort().values
        assert torch.equal(ordered, -ordered.flip(0))
        assert (ordered.diff() > 0).all()
        assert (ordered - quantiles).square().mean() < 1e-3
        torch.testing.assert_close(ordered.square().mean().sqrt().item(), GAIN[trellis.bits], rtol=2e-3, atol=0)


def mean_error(trellis, x):
    return float((x - decode(encode(x, trellis), trellis)).square().mean())


@pytest.mark.parametrize(("bits", "reported"), [(2, 0.071), (3, 0.0188), (4, 0.0053)])
def test_error_on_gaussian_numbers(bits, reported, sample):
    """Below a table of random Gaussian values of as many states, above the rate-distortion bound, falling with the states."""
    x = sample("gauss", 8192).view(32, 256)
    errors = [mean_error(Trellis(state_bits=state_bits, bits=bits), x) for state_bits in (6, 8, 10, 12)]
    assert errors == sorted(errors, reverse=True)
    assert 4.0**-bits < errors[-1] < reported * 1.03


def test_weights_move_the_error(seeded):
    trellis, x = Trellis(state_bits=8), seeded(50, 64, seed=6)
    weight = torch.cat([torch.full((32,), 0.01), torch.full((32,), 10.0)])
    plain, weighted = (decode(encode(x, trellis, weight=w), trellis) for w in (None, weight))
    assert squared(x, weighted, weight).sum() < 0.9 * squared(x, plain, weight).sum()
    assert torch.equal(encode(x, trellis, weight=weight), encode(x, trellis, weight=weight.expand(50, -1)))
    assert torch.equal(encode(x, trellis, weight=torch.full((64,), 4.0)), encode(x, trellis))


def test_rows_are_independent(seeded, monkeypatch):
    trellis, x = Trellis(state_bits=6, bits=3), seeded(7, 18, seed=7)
    whole = encode(x, trellis)
    assert torch.equal(encode(x.bfloat16().float().bfloat16(), trellis), encode(x.bfloat16().float(), trellis))
    assert torch.equal(encode(x.T.contiguous().T, trellis), whole)
    assert encode(x[:0], trellis).shape == (0, 18)
    monkeypatch.setattr(module, "SEARCH_BYTES", 1)
    assert torch.equal(encode(x, trellis), whole)


def test_equal_paths_give_the_lowest_states():
    """At weight 0 all paths are equal."""
    trellis = Trellis(state_bits=5)
    assert not encode(torch.ones(2, 9), trellis, weight=torch.zeros(9)).any()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bits": 5}, r"\(bits, vector\) must be 1 to 4 and 1 or 2, got \(5, 1\)"),
        ({"vector": 3}, r"\(bits, vector\) must be 1 to 4 and 1 or 2, got \(2, 3\)"),
        ({"state_bits": 17}, "state_bits must be an integer from 2 to 16, got 17"),
        ({"state_bits": 7, "bits": 4, "vector": 2}, "state_bits must be an integer from 8 to 16, got 7"),
        ({"state_bits": 12.0}, "state_bits must be an integer from 2 to 16, got 12.0"),
    ],
)
def test_trellises_that_are_none(given, said):
    with pytest.raises(ValueError, match=said):
        Trellis(**given)


def test_numbers_that_cannot_be_encoded():
    trellis, x = Trellis(state_bits=8), torch.zeros(2, 8)
    for name, bad, said in (
        ("x", x[0], r"x must be of shape \[R, T\], got \[8\]"),
        ("x", x[:, :3], "length must give the ring at least the 8 bits of a state at 2 bits each, got 3"),
        ("x", x.index_fill(1, torch.tensor([1]), torch.nan), "x must be finite, got NaN or infinity"),
        ("weight", torch.ones(7), r"weight must be of shape \[T\] or \[2, 8\], got \[7\]"),
        ("weight", -torch.ones(8), "weight must be finite and at least 0"),
        ("weight", torch.full((2, 8), torch.inf), "weight must be finite and at least 0"),
    ):
        with pytest.raises(ValueError, match=said):
            encode(**({"x": x, "trellis": trellis, "weight": None} | {name: bad}))
    with pytest.raises(ValueError, match="length must be a multiple of the 2 numbers of a step, got 9"):
        num_steps(Trellis(vector=2), 9)
    with pytest.raises(ValueError, match="states must follow each other by shifts"):
        pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]), trellis)

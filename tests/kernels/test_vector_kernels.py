"""Words of learned books: native decoding and products against the reference, at every level that this machine can run."""

import pytest
import torch
import torch.nn.functional as F

from dqtk import native
from dqtk.kernels import on_cpu, vectors
from dqtk.kernels.vectors import decode_vectors, decode_vectors_reference, linear_vectors
from dqtk.native import library
from dqtk.numerics.packing import Packed, dequantize, packed_width
from dqtk.spec import PerChannel, TensorSpec, VectorCodebook

LEVELS = [level.name for level in library.LEVELS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = [  # words, length, books
    (256, 8, 1), (256, 8, 2), (256, 8, 3), (256, 8, 4), (256, 8, 8), (256, 16, 2), (256, 16, 6), (256, 4, 1), (256, 2, 1),
    (64, 2, 1), (128, 1, 1), (32, 1, 1), (16, 4, 3), (8, 1, 2), (4, 2, 5), (16, 8, 2),
    (64, 3, 1), (4096, 6, 1), (4096, 12, 2), (512, 3, 1), (1024, 2, 1), (2048, 1, 3), (8192, 4, 1), (16384, 2, 5), (32768, 3, 1),
    (65536, 8, 1),
]  # fmt: skip
FEW = [FORMS[1], FORMS[7], FORMS[9], FORMS[14], FORMS[20], FORMS[25]]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 1e-12}


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(form, n, k, per_row=True):
    """Any bytes are codes, those of filled up rows too."""
    words, length, books = form
    generator = torch.Generator().manual_seed(0)
    width = packed_width((words - 1).bit_length(), k // length * books)
    qweight = torch.randint(0, 256, (n, width), dtype=torch.uint8, generator=generator)
    return qweight, seeded(books, words, length).half(), seeded(n if per_row else 1, 1, seed=1)


@pytest.mark.parametrize("level", [*LEVELS, "off"])
def test_decoding_equals_the_reference(level, native_level, environment):
    if level == "off":
        environment(DQTK_NATIVE="off")
    else:
        native_level(level)
    for i, form in enumerate(FORMS):
        for j, (n, k) in enumerate(((1, 16), (7, 48), (3, 1104), (130, 32))):
            k -= k % form[1]
            how, dtype = stored(form, n, k, (i + j) % 2 == 0), DTYPES[(i + j) % 3]
            y = decode_vectors(*how, k, dtype)
            assert torch.equal(y, decode_vectors_reference(*how, k, dtype)), (form, n, k, dtype)
            assert y.is_contiguous()


def test_the_reference_is_dequantize():
    spec = TensorSpec(format=VectorCodebook(words=64, length=2), granularity=PerChannel())
    qweight, codebook, scale = stored((64, 2, 1), 5, 48)
    expected = dequantize(Packed(qweight=qweight, codebook=codebook, scale=scale), spec, 48)
    assert torch.equal(decode_vectors(qweight, codebook, scale, 48, torch.float32), expected)
    assert torch.equal(decode_vectors(qweight, codebook, scale, 48, torch.float64), expected.double())


def test_parts_of_a_weight(built):
    """As layers decode it, from any row, by two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    how = stored(FORMS[2], 402, 520)
    whole = decode_vectors_reference(*how, 520, torch.bfloat16)
    decoder = native.vector_decoder(library.load(), *how, 520)
    for first, last in ((0, 402), (64, 128), (401, 402), (5, 5)):
        assert torch.equal(decoder.rows(first, torch.empty(last - first, 520, dtype=torch.bfloat16)), whole[first:last])
    torch.set_num_threads(before)


@pytest.mark.parametrize("form", FEW, ids=str)
@pytest.mark.parametrize("shape", [(80,), (0, 80), (2, 1, 80), (2, 3, 80)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_linear(form, shape, dtype):
    how, x = stored(form, 33, 80), seeded(*shape).to(dtype)
    weight = decode_vectors_reference(*how, 80, dtype)
    for bias in (seeded(33), None):
        y = linear_vectors(x, how[0], bias, *how[1:])
        assert (y.dtype, y.is_contiguous()) == (dtype, True)
        expected = F.linear(x.double(), weight.double(), None if bias is None else bias.to(dtype).double())
        torch.testing.assert_close(y.double(), expected, rtol=TOLERANCE[dtype], atol=5 * TOLERANCE[dtype])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows_at_every_level(level, rows, native_level):
    native_level(level)
    for form in FEW:
        how, x, bias = stored(form, 37, 80, per_row=False), seeded(rows, 80), seeded(37)
        expected = F.linear(x.double(), decode_vectors_reference(*how, 80, torch.float32).double(), bias.double())
        torch.testing.assert_close(linear_vectors(x, how[0], bias, *how[1:]).double(), expected, rtol=1e-4, atol=1e-4)


def test_linear_in_chunks(built, monkeypatch):
    monkeypatch.setattr(on_cpu, "CHUNK_BYTES", 64 * 80 * 4)
    how, x, bias = stored(FEW[1], 150, 80), seeded(5, 80), seeded(150)
    weight = decode_vectors_reference(*how, 80, torch.float32)
    torch.testing.assert_close(linear_vectors(x, how[0], bias, *how[1:]), F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


def test_a_large_weight_is_never_whole(built, peak_memory):
    """32 MiB of float32 weights; what the op takes is a chunk, and its output."""
    how, x = stored(FEW[0], 4096, 2048), seeded(4, 2048)
    assert peak_memory(lambda: linear_vectors(x, how[0], None, *how[1:])) < on_cpu.CHUNK_BYTES + (4 << 20)


def test_through_torch_rows_are_decoded_in_chunks(environment, monkeypatch):
    """The largest decoded matrix is a chunk; numbers are those of one chunk."""
    environment(DQTK_NATIVE="off")
    how, x, sizes, decode = stored(FEW[0], 200, 64), seeded(3, 64), [], vectors.decode_vectors_reference
    whole = linear_vectors(x, how[0], None, *how[1:])

    def watched(qweight, *rest):
        sizes.append(len(qweight))
        return decode(qweight, *rest)

    monkeypatch.setattr(vectors, "decode_vectors_reference", watched)
    monkeypatch.setitem(vectors.CHUNK_BYTES, "cpu", 64 * 64 * 4)
    torch.testing.assert_close(linear_vectors(x, how[0], None, *how[1:]), whole, rtol=1e-5, atol=1e-5)
    assert sizes == [64, 64, 64, 8]


@pytest.mark.parametrize("form", FEW[::2], ids=str)
def test_gradients_are_those_of_the_decoded_layer(form):
    how = stored(form, 33, 80)
    weight = decode_vectors_reference(*how, 80, torch.float32)
    leaves = [v.requires_grad_() for v in (seeded(3, 5, 80), seeded(33), seeded(3, 5, 80), seeded(33))]
    linear_vectors(leaves[0], how[0], leaves[1], *how[1:]).square().sum().backward()
    F.linear(leaves[2], weight, leaves[3]).square().sum().backward()
    for mine, plain in (leaves[::2], leaves[1::2]):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=1e-3, atol=1e-3)

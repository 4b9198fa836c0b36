"""What the Triton kernels must do, as plain functions of a device. Run as a script: what failed, as JSON.

    TRITON_INTERPRET=1 python tests/gpu/triton_cases.py     on any machine
    python tests/gpu/triton_cases.py cuda [beginning of names]

A compiled kernel takes a second to make and serves one combination of dtypes and options, so combinations are taken in turn.

Kept apart from pytest because Triton decides at import whether it interprets, and because machines with a GPU may have neither
pytest nor diffusers: only the kernel rooms are needed.
"""

import json
import sys
import traceback
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from dqtk.kernels.block_attention import block_attention_on_cuda, block_attention_reference
from dqtk.kernels.decoded import decode_reference, linear_decoded_on_cuda
from dqtk.kernels.linear import linear_int8_on_cuda, linear_int8_reference, linears_int8_on_cuda
from dqtk.kernels.trellis import decode_trellis_on_cuda, decode_trellis_reference, linear_trellis_on_cuda
from dqtk.kernels.vectors import decode_vectors_on_cuda, decode_vectors_reference, linear_vectors_on_cuda
from dqtk.numerics.packing import pack
from dqtk.numerics.packing import packed_width as code_width
from dqtk.numerics.trellis import MULTIPLIERS, packed_width
from dqtk.spec.trellis import Trellis

CASES: dict[str, Callable[[str], None]] = {}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = (((5, 24), 7), ((1, 8), 1), ((2, 3, 40), 16), ((1, 1, 17), 3), ((24,), 5), ((33, 129), 65), ((70, 1100), 40))
EMPTY = (((0, 24), 7), ((2, 0, 24), 7), ((3, 24), 0))
INPUTS = ("dynamic", "static", "static-asymmetric")


def case(run: Callable[[str], None]) -> Callable[[str], None]:
    CASES[run.__name__] = run
    return run


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(low: int, high: int, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def layer(n: int, k: int, bits: int = 8, size: int | None = None, inputs: str = "dynamic", bias: bool = True) -> tuple:
    """Arguments of dqtk::linear_int8 behind the input; ``size``: of groups."""
    half = 2 ** (bits - 1)
    codes = integers(1 - half, half, n, k)
    qweight = codes.to(torch.int8) if bits == 8 else pack(codes + half, bits)
    group_scale = None if size is None else integers(1, 127 // half + 1, n, k // size, seed=2).to(torch.uint8)
    given = None, None
    if inputs != "dynamic":
        given = torch.tensor([0.021]), torch.tensor([-37 if inputs == "static-asymmetric" else 0], dtype=torch.int32)
    scale = seeded(n, 1, seed=3).abs() * 0.01
    return qweight, scale, group_scale, seeded(n, seed=4) if bias else None, *given, bits


def moved(values, device: str) -> list:
    return [value.to(device) if isinstance(value, torch.Tensor) else value for value in values]


def same_integers(x: torch.Tensor, arguments: tuple, device: str, how: str) -> None:
    """Bit for bit, in the dtype and shape of the reference."""
    y, expected = linear_int8_on_cuda(*moved((x, *arguments), device)), linear_int8_reference(x, *arguments)
    assert (y.dtype, y.shape, y.is_contiguous()) == (expected.dtype, expected.shape, True), how
    assert torch.equal(y.cpu(), expected), f"{how}: off by {(y.cpu().double() - expected.double()).abs().max()}"


@case
def int8_equals_reference(device: str) -> None:
    for i, (shape, n) in enumerate((*SHAPES, *EMPTY)):
        for j, inputs in enumerate(INPUTS):
            dtype = DTYPES[(i + j) % 3]
            x, arguments = seeded(*shape).to(dtype), layer(n, shape[-1], inputs=inputs)
            same_integers(x, arguments, device, f"{shape} {n} {inputs} {dtype}")


@case
def layers_of_one_input_equal_each_alone(device: str) -> None:
    """Rounded once for all of them, with and without a static range, int8 and packed 4-bit weights."""
    for bits, size, inputs, dtype in ((8, None, "dynamic", torch.bfloat16), (4, 8, "static-asymmetric", torch.float32)):
        layers = [layer(n, 40, bits, size, inputs, bias=n != 7) for n in (16, 7, 33)]
        stored = [list(column) for column in zip(*(arguments[:4] for arguments in layers), strict=True)]
        x, smooth = seeded(2, 5, 40).to(dtype), seeded(40, seed=5).abs()
        given = [moved(column, device) for column in stored]
        ys = linears_int8_on_cuda(x.to(device), *given, *moved(layers[0][4:], device), smooth.to(device))
        for y, arguments in zip(ys, layers, strict=True):
            expected = linear_int8_reference(x, *arguments, smooth)
            assert torch.equal(y.cpu(), expected), f"{bits} bits, {inputs}"


@case
def int8_without_bias_and_with_one_scale(device: str) -> None:
    qweight, _, *rest = layer(7, 24, bias=False)
    same_integers(seeded(5, 24), (qweight, torch.tensor([[0.02]]), *rest), device, "one scale")


@case
def int8_of_strided_inputs(device: str) -> None:
    for x in (
        seeded(24, 10).T,
        seeded(3, 24, 5).transpose(1, 2),
        seeded(6, 48)[:, ::2],
        seeded(6, 48)[:, 3:27],
        seeded(1, 24).expand(4, 24),
    ):
        same_integers(x, layer(7, 24), device, f"strides {x.stride()}")


@case
def int8_smooths(device: str) -> None:
    for dtype in DTYPES:
        smooth = (seeded(129, seed=5).abs() + 0.1).to(dtype)
        same_integers(seeded(9, 129).to(dtype), (*layer(65, 129), smooth), device, str(dtype))


@case
def int8_ends_with_the_activation(device: str) -> None:
    """erf and exp differ from the CPU's in the last places, which rounding to the dtype can make one unit of it."""
    tolerance = {torch.float32: (1e-5, 1e-6), torch.bfloat16: (8e-3, 1e-5), torch.float16: (1e-3, 3e-5)}
    for dtype in DTYPES:
        for activation in ("gelu", "gelu_tanh"):
            for active_from in (0, 20, 40):
                x, arguments = 0.2 * seeded(9, 24).to(dtype), (*layer(40, 24), None, activation, active_from)
                y, expected = linear_int8_on_cuda(*moved((x, *arguments), device)).cpu(), linear_int8_reference(x, *arguments)
                assert torch.equal(y[:, :active_from], expected[:, :active_from])
                rtol, atol = tolerance[dtype]
                torch.testing.assert_close(y, expected, rtol=rtol, atol=atol)


@case
def int8_saturates(device: str) -> None:
    """Of a static range; huge numbers and halves between two codes round as the reference's."""
    x = torch.tensor([[1e30, -1e30, 0.0, 0.021 * 127] * 6, [0.021 * (i - 11.5) for i in range(24)]])
    for inputs in INPUTS:
        same_integers(x, layer(7, 24, inputs=inputs), device, inputs)


@case
def int8_of_zeros_and_tiny_rows(device: str) -> None:
    for value in (0.0, 1e-30, 1e-38):
        for inputs in INPUTS:
            same_integers(torch.full((3, 24), value), layer(7, 24, inputs=inputs), device, f"{value} {inputs}")


@case
def int8_does_not_hide_nan(device: str) -> None:
    np.seterr(invalid="ignore")  # the interpreter computes with numpy, whose opinion of inf / inf is known
    for wrong in (float("nan"), float("inf"), float("-inf")):
        for inputs in INPUTS:
            x = seeded(3, 24)
            x[1, 4] = wrong
            y = linear_int8_on_cuda(*moved((x, *layer(7, 24, inputs=inputs)), device)).cpu()
            assert not torch.isfinite(y[1]).any(), (wrong, inputs)
            assert torch.isfinite(y[[0, 2]]).all(), (wrong, inputs)


@case
def int8_in_every_tile(device: str) -> None:
    """More than one tile each way, and not a whole number of them."""
    from dqtk.gpu.integer import linear_int8
    from dqtk.gpu.tiles import INT8

    for tile in INT8:
        x, arguments = seeded(tile.rows + 3, tile.width + 5), layer(tile.outputs + 9, tile.width + 5, inputs="static-asymmetric")
        y = linear_int8(*moved((x, *arguments), device), tile=tile)
        assert torch.equal(y.cpu(), linear_int8_reference(x, *arguments)), tile


@case
def int4_equals_reference(device: str) -> None:
    for i, (shape, n) in enumerate((*SHAPES, *EMPTY)):
        for j, inputs in enumerate(INPUTS):
            dtype = DTYPES[(i + j) % 3]
            x, arguments = seeded(*shape).to(dtype), layer(n, shape[-1], 4, inputs=inputs)
            same_integers(x, arguments, device, f"{shape} {n} {inputs} {dtype}")


@case
def int4_in_groups(device: str) -> None:
    """Of a part of a tile, of whole ones, and of sizes that torch expands."""
    for k, size in ((40, 8), (96, 16), (96, 32), (320, 64), (768, 256), (1024, 1024), (96, 48), (24, 4), (24, 2)):
        for inputs in INPUTS:
            same_integers(seeded(5, k), layer(37, k, 4, size, inputs), device, f"{k} in groups of {size} {inputs}")


@case
def int4_in_every_tile(device: str) -> None:
    from dqtk.gpu.integer import linear_int8
    from dqtk.gpu.tiles import INT4

    for tile in INT4:
        k = 2 * tile.width + 16
        x, arguments = seeded(tile.rows + 3, k), layer(tile.outputs + 9, k, 4, 16, "static-asymmetric")
        y = linear_int8(*moved((x, *arguments), device), tile=tile)
        assert torch.equal(y.cpu(), linear_int8_reference(x, *arguments)), tile


@case
def int4_smooths_and_activates(device: str) -> None:
    x, smooth = seeded(9, 128).bfloat16(), seeded(128, seed=5).abs() + 0.1
    same_integers(x, (*layer(65, 128, 4, 64), smooth), device, "smooth")
    for active_from in (0, 30):
        arguments = (*layer(65, 128, 4, 64), smooth, "gelu", active_from)
        y, expected = linear_int8_on_cuda(*moved((x, *arguments), device)).cpu(), linear_int8_reference(x, *arguments)
        torch.testing.assert_close(y, expected, rtol=8e-3, atol=1e-5)


@case
def int4_stays_packed(device: str) -> None:
    from dqtk.gpu.integer import stays_packed

    for k, size, packed in ((64, None, True), (64, 8, True), (64, 64, True), (96, 48, False), (64, 4, False)):
        qweight, _, group_scale, *_ = layer(5, k, 4, size)
        assert stays_packed(qweight, group_scale, 4, k) == packed, size
    assert not stays_packed(layer(5, 64, 8)[0], None, 8, 64)


def with_gaps(values: tuple) -> list:
    """The same tensors, every other column of larger ones."""
    return [
        torch.stack([value, value], -1).flatten(-2)[..., ::2] if isinstance(value, torch.Tensor) and value.numel() > 1 else value
        for value in values
    ]


@case
def stored_tensors_may_have_gaps(device: str) -> None:
    x = seeded(5, 64).bfloat16()
    for bits, size in ((8, None), (4, 32)):
        arguments = (*with_gaps(layer(37, 64, bits, size)), *with_gaps((seeded(64, seed=5).abs(),)))
        assert not arguments[3].is_contiguous()
        same_integers(x, arguments, device, f"{bits} bits")
    for kind in ("uint4", "two-level4", "table4", "int8"):
        near(x, tuple(with_gaps(weight_only(37, 64, kind, 2))), device, kind, *with_gaps((seeded(37, seed=4),)))


@case
def ops_of_the_device(device: str) -> None:
    """Through the dispatcher, with whatever kernels it finds."""
    for bits, size in ((8, None), (4, 32)):
        x, arguments = seeded(2, 5, 64).bfloat16(), layer(37, 64, bits, size)
        y = torch.ops.dqtk.linear_int8(*moved((x, *arguments), device))
        assert torch.equal(y.cpu(), linear_int8_reference(x, *arguments)), bits
    for kind in KINDS:
        qweight, *rest = stored = weight_only(37, 64, kind, 2)
        y = torch.ops.dqtk.linear_decoded(*moved((x, qweight, None, *rest), device)).cpu().double()
        expected = x.double() @ decode_reference(*stored, 64, x.dtype).double().T
        torch.testing.assert_close(y, expected, rtol=4e-3, atol=1e-5 * expected.abs().max().item())
    codes, scale, x = seeded(40, 64).to(torch.float8_e4m3fn), seeded(40, 1, seed=3).abs(), seeded(2, 5, 64)
    y, expected = (torch.ops.dqtk.linear_fp8(*moved((x, codes, scale, None, None), where)).cpu() for where in (device, "cpu"))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@case
def other_widths_equal_reference(device: str) -> None:
    for bits in (2, 3, 5, 6, 7):
        same_integers(seeded(5, 24), layer(7, 24, bits), device, f"{bits} bits")
        same_integers(seeded(5, 64), layer(7, 64, bits, 32 if bits < 7 else None, "static"), device, f"{bits} bits in groups")


def weight_only(n: int, k: int, kind: str, groups: int = 1) -> tuple:
    """Codes, steps, zero, group_scale, selector, levels, bits, signed; ``kind``: int4, uint4, table4, two-level4 and so on."""
    bits = int(kind[-1])
    raw = integers(0, 2**bits, n, k).to(torch.uint8)
    qweight = raw.view(torch.int8) if kind == "int8" else raw if bits == 8 else pack(raw, bits)
    groups_of_steps = 1 if kind.startswith("two-level") else groups
    steps = seeded(n, groups_of_steps, seed=6).abs() * 0.1
    zero = integers(0, 2**bits, n, groups_of_steps, seed=7).to(torch.uint8) if kind.startswith("uint") else None
    group_scale = integers(1, 16, n, groups, seed=8).to(torch.uint8) if kind.startswith("two-level") else None
    levels = seeded(1, 2**bits, seed=9) if kind.startswith("table") else None
    return qweight, steps, zero, group_scale, None, levels, bits, kind.startswith(("int", "two-level"))


KINDS = ("int4", "uint4", "table4", "two-level4", "int8", "uint8", "table8")


def near(x: torch.Tensor, stored: tuple, device: str, how: str, bias: torch.Tensor | None = None) -> None:
    """To float64 of the decoded weight, within the dtype's rounding and that of float32 sums."""
    qweight, *rest = stored
    y = linear_decoded_on_cuda(*moved((x, qweight, bias, *rest), device))
    expected = x.double() @ decode_reference(*stored, x.shape[-1], x.dtype).double().T
    expected = expected if bias is None else expected + bias.to(x.dtype).double()
    assert (y.dtype, y.shape, y.is_contiguous()) == (x.dtype, expected.shape, True), how
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 6e-4}[x.dtype]  # half a unit in the last place, and sums
    scale = expected.abs().amax().item() if expected.numel() else 1.0
    torch.testing.assert_close(y.cpu().double(), expected, rtol=tolerance, atol=1e-5 * scale, msg=lambda text: f"{how}: {text}")


def rings(n: int, k: int, tile: tuple[int, int], trellis: Trellis) -> torch.Tensor:
    """Any bits are a ring."""
    count, length = -(-n // tile[0]) * -(-k // tile[1]), tile[0] * tile[1]
    return integers(0, 256, count, packed_width(trellis, length)).to(torch.uint8)


@case
def trellises_equal_reference(device: str) -> None:
    """In tiles and rows, whole bytes or not, the last tiles cut off."""
    tiles = (((16, 16), 33, 70), ((1, 64), 7, 64), ((2, 12), 5, 25), ((1, 19), 3, 19))
    for i, (bits, vector) in enumerate(MULTIPLIERS):
        for j, state_bits in enumerate((8, 12, 16)):
            tile, n, k = tiles[(i + j) % (4 if vector == 1 else 3)]
            trellis = Trellis(state_bits=state_bits, bits=bits, vector=vector)
            packed, scale = rings(n, k, tile, trellis), (seeded(n, 1), seeded(1, 1), None)[i % 3]
            how = n, k, *tile, state_bits, bits, vector, DTYPES[j]
            y, expected = (
                decode_trellis_on_cuda(*moved((packed, scale, *how), device)),
                decode_trellis_reference(packed, scale, *how),
            )
            assert (y.dtype, y.is_contiguous()) == (expected.dtype, True), how
            assert torch.equal(y.cpu(), expected), how


@case
def trellises_multiply(device: str) -> None:
    trellis, x, bias = Trellis(state_bits=12, bits=2), seeded(2, 5, 40).bfloat16(), seeded(33, seed=4)
    packed, scale, how = rings(33, 40, (16, 16), trellis), seeded(33, 1), (33, 16, 16, 12, 2, 1)
    y = linear_trellis_on_cuda(*moved((x, packed, bias, scale, *how), device))
    weight = decode_trellis_reference(packed, scale, 33, 40, *how[1:], torch.bfloat16)
    expected = x.double() @ weight.double().T + bias.bfloat16().double()
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-2, atol=1e-2)
    assert decode_trellis_on_cuda(*moved((packed[:0], None, 0, 40, *how[1:], torch.bfloat16), device)).shape == (0, 40)


def words(n: int, k: int, num: int, length: int, books: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Any bytes are codes; and books."""
    width = code_width((num - 1).bit_length(), k // length * books)
    return integers(0, 256, n, width).to(torch.uint8), seeded(books, num, length, seed=3).half()


FORMS = (
    (256, 8, 3), (256, 4, 1), (64, 2, 1), (256, 16, 2), (128, 1, 1), (32, 1, 1), (16, 4, 3), (8, 1, 2), (4, 2, 5), (64, 3, 1),
    (512, 3, 1), (4096, 6, 1), (32768, 12, 2), (65536, 8, 1),
)  # fmt: skip


@case
def words_equal_reference(device: str) -> None:
    """Of every width of codes, filled up rows and parts of a program too."""
    for i, form in enumerate(FORMS):
        for j, (n, k) in enumerate(((1, 16), (7, 48), (5, 1104))):
            k -= k % form[1]
            stored = *words(n, k, *form), seeded(*((n, 1), (1, 1))[(i + j) % 2]), k, DTYPES[(i + j) % 3]
            y, expected = decode_vectors_on_cuda(*moved(stored, device)), decode_vectors_reference(*stored)
            assert (y.dtype, y.is_contiguous()) == (expected.dtype, True), (form, n, k)
            assert torch.equal(y.cpu(), expected), (form, n, k)
    stored = *words(0, 16, *FORMS[0]), seeded(0, 1), 16, torch.float32
    assert decode_vectors_on_cuda(*moved(stored, device)).shape == (0, 16)


@case
def words_multiply(device: str) -> None:
    for dtype in (torch.bfloat16, torch.float64):  # the latter through torch
        x, bias, stored = seeded(2, 5, 48).to(dtype), seeded(33, seed=4), (*words(33, 48, *FORMS[0]), seeded(33, 1))
        y = linear_vectors_on_cuda(*moved((x, stored[0], bias, *stored[1:]), device))
        weight = decode_vectors_reference(*stored, 48, dtype)
        expected = x.double() @ weight.double().T + bias.to(dtype).double()
        torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-2, atol=1e-2)
        assert y.dtype == dtype


@case
def decoded_is_near_float64(device: str) -> None:
    for i, kind in enumerate(KINDS):
        for j, (shape, n) in enumerate(SHAPES if kind in ("uint4", "int8") else (*SHAPES[i % 3 :: 3], *EMPTY)):
            x = seeded(*shape).to(DTYPES[(i + j) % 3])
            near(x, weight_only(n, shape[-1], kind), device, f"{kind} {shape} {n} {x.dtype}", seeded(n, seed=4))


@case
def decoded_in_groups(device: str) -> None:
    for i, kind in enumerate(KINDS):
        for k, size in (((64, 8), (320, 64), (96, 48)), ((96, 32), (768, 256)))[i % 2]:
            near(seeded(5, k).bfloat16(), weight_only(37, k, kind, k // size), device, f"{kind}, {k} in groups of {size}")


@case
def decoded_numbers_are_exact(device: str) -> None:
    """Inputs that pick one weight each: no sums."""
    for kind in KINDS:
        for dtype in (torch.bfloat16, torch.float16):
            stored = weight_only(37, 64, kind, 2)
            y = linear_decoded_on_cuda(*moved((torch.eye(64).to(dtype), stored[0], None, *stored[1:]), device))
            assert torch.equal(y.cpu(), decode_reference(*stored, 64, dtype).T), kind


@case
def decoded_with_one_step(device: str) -> None:
    for kind in KINDS:
        qweight, _, zero, *rest = weight_only(37, 64, kind)
        stored = qweight, torch.tensor([[0.05]]), None if zero is None else zero[:1], *rest
        near(seeded(5, 64).bfloat16(), stored, device, kind)


@case
def decoded_of_strided_inputs(device: str) -> None:
    for kind in ("uint4", "int8"):
        for x in (seeded(24, 10).T, seeded(3, 24, 5).transpose(1, 2), seeded(6, 48)[:, ::2], seeded(1, 24).expand(4, 24)):
            near(x.bfloat16(), weight_only(7, 24, kind), device, f"{kind} strides {x.stride()}")


@case
def decoded_in_every_tile(device: str) -> None:
    from dqtk.gpu.decoded import Stored, linear_decoded
    from dqtk.gpu.tiles import DECODED

    for kind in ("uint4", "int8"):
        for tile in DECODED:
            k = 2 * tile.width + 16
            x, stored = seeded(tile.rows + 3, k).bfloat16(), weight_only(tile.outputs + 9, k, kind, k // 16)
            y = linear_decoded(*moved((x, None), device), Stored(*moved(stored, device)), tile)
            expected = x.double() @ decode_reference(*stored, k, x.dtype).double().T
            torch.testing.assert_close(y.cpu().double(), expected, rtol=4e-3, atol=1e-5 * expected.abs().max().item())


@case
def decoded_says_what_it_takes(device: str) -> None:
    from dqtk.gpu.decoded import Stored, takes

    x = seeded(5, 96).bfloat16()
    three_groups = ((kind, 3, True) for kind in KINDS)
    for kind, groups, taken in (*three_groups, ("int4", 2, False), ("uint4", 1, True), ("int3", 1, False)):
        assert takes(x, Stored(*weight_only(7, 96, kind, groups))) == taken, (kind, groups)
    assert not takes(x.float(), Stored(*weight_only(7, 96, "int4")))


# --- attention -----------------------------------------------------------------------------------------------------------

# batch, heads, tokens, channels, channels of values, query block, key block
ATTENTION = (
    (2, 2, 150, 72, 40, 64, 64),
    (1, 2, 130, 64, 64, 128, 64),
    (1, 1, 129, 128, 128, 64, 128),
    (1, 2, 70, 24, 16, 16, 32),
    (1, 1, 50, 16, 24, 32, 16),
    (1, 2, 1, 8, 8, 64, 64),
)
CLOSE = {torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}


def attention_inputs(shape: tuple, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v as projections give them; keys have a mean."""
    b, h, n, d, e, *_ = shape
    q, k, v = (seeded(b, n, h, size, seed=i).transpose(1, 2) for i, size in enumerate((d, d, e)))
    return [t.to(dtype) for t in (q, k + 2 * seeded(d, seed=8), v)]


def drawn_orders(shape: tuple) -> torch.Tensor:
    draw = torch.Generator().manual_seed(4)
    return torch.stack([torch.randperm(shape[2], generator=draw) for _ in range(shape[1])]).to(torch.int32)


def drawn_blocks(shape: tuple, density: float) -> torch.Tensor:
    """uint8 [H, R, bytes]; some rows of blocks see nothing."""
    _, h, n, *_, block_q, block_k = shape
    live = torch.rand(h, -(-n // block_q), -(-n // block_k), generator=torch.Generator().manual_seed(9)) < density
    padded = F.pad(live.to(torch.uint8), (0, -live.shape[2] % 8)).unflatten(2, (-1, 8))
    return (padded << torch.arange(8, dtype=torch.uint8)).sum(3).to(torch.uint8)


def attends(given: list[torch.Tensor], arguments: tuple, device: str, how: str, run: Callable = block_attention_on_cuda) -> None:
    """Like the reference: within the dtype's rounding; where probabilities are codes, some of them fall on the other side."""
    y, expected = run(*moved((*given, *arguments), device)).cpu(), block_attention_reference(*given, *arguments)
    assert (y.dtype, y.shape, y.transpose(1, 2).is_contiguous()) == (expected.dtype, expected.shape, True), how
    dtype, pv_bits = given[0].dtype, arguments[7]
    difference = (y.float() - expected.float()).abs()
    off = (difference > CLOSE[dtype] * (1 + expected.float().abs())).any(-1).float().mean()
    assert off == 0 if pv_bits == 16 else off < 0.03, f"{how}: {off:.3f} of the rows, by {difference.max():.4f} at most"
    if pv_bits < 16:
        assert difference.max() <= 2 / (2**pv_bits - 1) * given[2].float().abs().max(), how


@case
def attention_of_live_blocks(device: str) -> None:
    for i, shape in enumerate(ATTENTION):
        for j, (order, live) in enumerate(((None, 0.4), (1, 0.4), (1, 1.0), (1, 0.0))):
            dtype = DTYPES[(i + j) % 3]
            arguments = order and drawn_orders(shape), drawn_blocks(shape, live), None, *shape[5:], 0.2, 16, 16, "row", "none"
            attends(attention_inputs(shape, dtype), arguments, device, f"{shape} {order} {live} {dtype}")


@case
def attention_in_integers(device: str) -> None:
    widths = ((8, 8), (8, 16), (16, 8), (4, 4), (8, 4))
    for i, shape in enumerate(ATTENTION):
        for j, smooth in enumerate(("none", "k", "qk")):
            dtype, bits = DTYPES[(i + j) % 3], widths[(i * 3 + j) % len(widths)]
            live = drawn_blocks(shape, 0.5) if j else None
            arguments = drawn_orders(shape), live, None, *shape[5:], 0.15, *bits, "row", smooth
            attends(attention_inputs(shape, dtype), arguments, device, f"{shape} {bits} {smooth} {dtype}")


@case
def attention_codes_are_exact(device: str) -> None:
    """Keys and values rounded as the reference rounds them, in its order."""
    from dqtk.gpu.attention_rows import move_rows
    from dqtk.kernels.block_attention import _codes

    for dtype, block, channels in ((torch.bfloat16, 64, 72), (torch.float16, 16, 32), (torch.float32, 32, 40)):
        shape = (2, 2, 150, channels)
        x, order = 3 * seeded(*shape).to(dtype), drawn_orders(shape)
        mean, wide = x.float().mean(2), 128 if channels == 72 else 64
        for most in (127, 7):
            keys = move_rows(*moved((x, order, mean), device), block, wide, "keys", most)
            values = move_rows(*moved((x, order), device), None, block, wide, "values", most)
            plain = move_rows(*moved((x, order), device), None, block, wide, "plain")
            for pair in range(4):
                b, h = divmod(pair, 2)
                rows = x[b, h, order[h].long()]
                less = (rows.float() - mean[b, h])[None]
                for made, per_channel, given in ((keys, False, less), (values, True, rows.float()[None])):
                    codes, scale = _codes(given, block, most, per_channel)
                    found = made.rows[pair].cpu()
                    found = found.transpose(1, 2).flatten(0, 1) if per_channel else found
                    assert torch.equal(found[:150, :channels].float(), codes[0]), (dtype, most, per_channel)
                    assert not found[150:].any()
                    assert not found[:, channels:].any()
                    steps = made.scales[pair].cpu()
                    expected = scale[0, ::block]
                    assert torch.equal(steps[:, :channels] if per_channel else steps[:, None], expected)
                sums = values.rows[pair].cpu().int().sum(2)
                assert torch.equal(values.sums[pair].cpu(), sums.to(torch.int32))
                assert torch.equal(plain.rows[pair].cpu()[:150, :channels], rows)


@case
def attention_lists_live_blocks(device: str) -> None:
    from dqtk.gpu.attention_rows import list_live
    from dqtk.numerics.block_masks import unpack

    for columns in (1, 7, 8, 30, 300, 600):
        shape = (1, 2, columns * 16, 8, 8, 16 * (-(-columns // 3)), 16)
        for density in (0.0, 0.3, 1.0):
            live = drawn_blocks(shape, density)
            listed, counts = (t.cpu() for t in list_live(live.to(device), columns))
            for h, row in ((h, row) for h in range(2) for row in range(live.shape[1])):
                expected = unpack(live, columns)[h, row].nonzero()[:, 0].int()
                assert torch.equal(listed[h, row, : counts[h, row]], expected), (columns, density)


@case
def attention_honours_masks(device: str) -> None:
    """In the original order; keys that nobody sees, queries that see nothing."""
    shape = (2, 2, 100, 24, 40, 32, 32)
    n = shape[2]
    kept, every = seeded(2, 1, 1, n, seed=5) > -0.5, seeded(2, 2, n, n, seed=6) > 0
    every[0, 1, 7], every[1, :, :, 64:] = False, False
    masks = (
        kept,
        every,
        torch.zeros(n).masked_fill(~kept[0, 0, 0], -10000.0),
        torch.zeros(n, n).masked_fill(~every[0, 1], -torch.inf).bfloat16(),
        seeded(1, 2, n, 1),
        seeded(2, 1, n, n).mT.contiguous().mT,
    )
    for i, mask in enumerate(masks):
        for bits in (16, 8):
            order, live = drawn_orders(shape) if i % 2 else None, drawn_blocks(shape, 0.6)
            live[0, 1] = 0
            arguments = order, live, mask, 32, 32, 0.3, bits, bits, "row", "none" if bits == 16 else "qk"
            attends(attention_inputs(shape, DTYPES[i % 2]), arguments, device, f"mask {i}, {bits} bits")


@case
def attention_with_text(device: str) -> None:
    """Text that never moves before or behind a grid that does, and part of it padding."""
    shape = (1, 2, 135, 64, 64, 64, 64)
    for text in (slice(0, 39), slice(96, 135)):
        order = torch.arange(135, dtype=torch.int32).repeat(2, 1)
        grid = [i for i in range(135) if not text.start <= i < text.stop]
        order[:, grid] = torch.tensor(grid, dtype=torch.int32)[drawn_orders((1, 2, 96)).long()]
        mask = torch.ones(1, 1, 1, 135, dtype=torch.bool)
        mask[..., text.stop - 9 : text.stop] = False
        live = drawn_blocks(shape, 0.3) | (1 << text.start // 64)
        for bits in (16, 8):
            arguments = order, live, mask, 64, 64, 0.125, bits, bits, "row", "none" if bits == 16 else "k"
            attends(attention_inputs(shape, torch.bfloat16), arguments, device, f"text {text} {bits}")


@case
def attention_in_every_way(device: str) -> None:
    """Every way to walk over the blocks, rows put in order before or picked up; blocks of queries larger than a tile."""
    from dqtk.gpu.attention import block_attention
    from dqtk.gpu.tiles import PASSES, Pass

    for how in (*PASSES["attention16-64"], Pass(4, 1)):
        for shape in ((1, 2, 150, 64, 64, 64, 64), (1, 1, 300, 40, 72, 256, 64)):
            arguments = drawn_orders(shape), drawn_blocks(shape, 0.5), None, *shape[5:], 0.2, 16, 16, "row", "none"

            def run(*given, how=how):
                return block_attention(*given[:11], given[12], how=how)

            attends(attention_inputs(shape, torch.bfloat16), arguments, device, f"{how} {shape}", run)


@case
def attention_does_not_hide_nan(device: str) -> None:
    np.seterr(invalid="ignore", over="ignore")
    warnings.filterwarnings("ignore", message="All-NaN")  # the interpreter's numpy again
    shape = (1, 1, 96, 32, 32, 32, 32)
    live = torch.tensor([[[1], [2], [4]]], dtype=torch.uint8)  # the diagonal
    for bits in (16, 8):
        for place in range(3):
            given = attention_inputs(shape, torch.float32)
            given[place][0, 0, 40, 3] = float("nan")
            arguments = None, live, None, 32, 32, 0.2, bits, bits, "row", "none"
            y = block_attention_on_cuda(*moved((*given, *arguments), device)).cpu()[0, 0]
            assert torch.isfinite(y[[*range(32), *range(64, 96)]]).all(), (bits, place)
            assert not torch.isfinite(y[40]).all(), (bits, place)


def failures(device: str, beginning: str = "") -> dict[str, str]:
    """Name -> traceback, or nothing where it went well; of cases whose names begin so."""
    found = {}
    for name, run in CASES.items():
        if not name.startswith(beginning):
            continue
        try:
            run(device)
            found[name] = ""
        except Exception:  # noqa: BLE001, whatever it is goes into the report
            found[name] = traceback.format_exc()
    return found


if __name__ == "__main__":
    found = failures(*(sys.argv[1:] or ["cpu"]))
    print(json.dumps(found))
    sys.exit(any(found.values()))

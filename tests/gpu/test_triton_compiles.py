"""The Triton kernels compiled for devices that need not be here: tensor cores, copies ahead, shared memory, exact products."""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dqtk.gpu import attention, attention_rows, decoded, device, integer, tiles, trellis, vectors

SMALLEST = 99 << 10  # bytes of shared memory of a thread block, capabilities 8.6 and 8.9
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma"}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel, capability, types, constants, exact=True, **options):
    """A kernel for a capability; every number and address a multiple of 16, as in most models."""
    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(names, types.split(), strict=True)) | dict.fromkeys(constants, "constexpr")
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options | (device.EXACT if exact else {}))


def is_exact(made):
    """Whether products round before they are added to, and quotients to nearest."""
    return "fma.rn.f32" not in made.asm["ptx"] and "div.full" not in made.asm["ptx"]


ROUNDED = {"SMOOTH": False, "STATIC": False, "ZERO": False, "HALVES": False, "BLOCK": 1024}
NOTHING = {"smooth": None, "input_scale": None, "input_zero": None}


@pytest.mark.parametrize("capability", TENSOR_CORES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_rounding(capability, dtype):
    smooth = ROUNDED | {"SMOOTH": True, "HALVES": True, "input_scale": None, "input_zero": None}
    static = ROUNDED | {"STATIC": True, "ZERO": True, "smooth": None}
    for types, constants in (
        (f"*{dtype} *i8 *fp32 i32 i32 i32", ROUNDED | NOTHING),
        (f"*{dtype} *fp32 *i8 *fp32 i32 i32 i32", smooth),
        (f"*{dtype} *fp32 *i32 *i8 *fp32 i32 i32 i32", static),
    ):
        made = compiled(integer._round_rows, capability, types, constants, num_warps=4)
        assert is_exact(made)
        assert "div.rn.f32" in made.asm["ptx"]


@pytest.mark.parametrize("sizes", [("T",), ("N",), ("K",), ("T", "N", "K")], ids=str)
def test_sizes_of_one(sizes):
    """Triton compiles a number that is 1 as a constant."""
    one = dict.fromkeys(sizes, 1)
    numbers = " i32" * (3 - len(one))
    tile = {"TILE_T": 16, "TILE_N": 32, "TILE_K": 64, "BAND": 8, "ACTIVATION": 1}
    ends = {"bias": None, "input_zero": None, "BIAS": False, "ZERO": False, "scale_step": 1, "active_from": 1}
    compiled(integer._multiply, 90, f"*i8 *i8 *bf16 *fp32 *fp32{numbers}", tile | ends | one)
    halves = tile | ends | one | {"group_scale": None, "GROUP": 0, "groups": 1}
    compiled(integer._multiply_4bit, 90, f"*i8 *u8 *bf16 *fp32 *fp32{numbers} i32", halves)
    del tile["ACTIVATION"]
    switches = {"BIAS": False, "SIGNED": True, "LEVELS": False, "ZERO": False, "SCALED": False, "bias": None, "stride": 1}
    constants = KINDS["int8"] | tile | switches | one | {"row_step": 1, "groups": 1}
    compiled(decoded._multiply_decoded, 90, f"*bf16 *i8 *fp32 *bf16{numbers} i32", constants)
    if "K" in one:
        compiled(integer._round_rows, 90, "*bf16 *i8 *fp32 i32 i32", ROUNDED | NOTHING | {"K": 1})


def product(kernel, capability, tile, types, constants):
    """A product's kernel, which must use tensor cores, load ahead and fit into shared memory."""
    constants = constants | {"TILE_T": tile.rows, "TILE_N": tile.outputs, "TILE_K": tile.width, "BAND": 8}
    made = compiled(kernel, capability, types, constants, num_warps=tile.warps, num_stages=tile.stages)
    assert (TENSOR_CORES[capability] if tile.rows >= 64 else "mma.sync") in made.asm["ptx"]
    assert "cp.async" in made.asm["ptx"]
    assert made.metadata.shared <= SMALLEST
    return made


@pytest.mark.parametrize("capability", TENSOR_CORES)
@pytest.mark.parametrize("tile", tiles.INT8, ids=str)
def test_integer_product(capability, tile):
    constants = {"BIAS": True, "ZERO": False, "ACTIVATION": 0, "input_zero": None}
    types = "*i8 *i8 *bf16 *fp32 *fp32 i32 *bf16 i32 i32 i32 i32"
    assert is_exact(product(integer._multiply, capability, tile, types, constants))


@pytest.mark.parametrize("capability", TENSOR_CORES)
@pytest.mark.parametrize(("tile", "group"), [(tile, group) for tile in tiles.INT4 for group in (0, 16, 64)][::2], ids=str)
def test_product_of_4_bits(capability, tile, group):
    constants = {"BIAS": False, "ZERO": True, "ACTIVATION": 2, "GROUP": group, "bias": None}
    constants |= {} if group else {"group_scale": None}
    types = f"*i8 *u8 {'*u8' if group else ''} i32 *bf16 *fp32 *fp32 i32 *i32 i32 i32 i32 i32 i32"
    product(integer._multiply_4bit, capability, tile, types, constants)


KINDS = {
    "int8": {"HALVES": False, "levels": None, "zeros": None, "group_scale": None, "GROUP": 0, "STEP_GROUP": 0},
    "uint4": {"HALVES": True, "levels": None, "group_scale": None, "GROUP": 32, "STEP_GROUP": 32},
    "table4": {"HALVES": True, "zeros": None, "group_scale": None, "GROUP": 16, "STEP_GROUP": 16},
    "two-level4": {"HALVES": True, "levels": None, "zeros": None, "GROUP": 32, "STEP_GROUP": 0},
}


@pytest.mark.parametrize("capability", TENSOR_CORES)
@pytest.mark.parametrize("tile", tiles.DECODED[::2], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_decoded_product(kind, tile, capability):
    given = {"x": "*bf16", "weight": "*i8" if kind == "int8" else "*u8", "levels": "*fp32", "steps": "*fp32"}
    given |= {"zeros": "*u8", "group_scale": "*u8", "bias": "*bf16", "y": "*bf16"}
    types = " ".join(dtype for name, dtype in given.items() if name not in KINDS[kind]) + " i32" * 7
    constants = {"BIAS": True, "SIGNED": kind == "two-level4", "LEVELS": kind == "table4", "ZERO": kind == "uint4"}
    constants |= {"SCALED": kind == "two-level4"} | KINDS[kind]
    product(decoded._multiply_decoded, capability, tile, types, constants)


# --- attention -----------------------------------------------------------------------------------------------------------

STRIDES = " i32" * 16
ORDERED = {"MASK": "", "ORDER": True, "LISTED": True, "RAGGED": True, "TILES_PER_BLOCK": 1}


def attends(capability, channels, block, how, qk=0, pv=0, smooth=False, dtype="bf16", **more):
    """The kernel over blocks, whose products must be of tensor cores and fit into shared memory."""
    rows, keys = block
    sizes = {"ROWS": rows, "KEYS": keys, "CHANNELS": channels, "WIDE": 128, "OUTPUTS": channels, "WIDE_OUT": 128}
    constants = ORDERED | sizes | more | {"QK": qk, "PV": pv, "SMOOTH_Q": smooth, "MOVED": how.moved}
    kept = {"keys": qk or how.moved, "key_scales": qk, "key_mean": smooth, "values": pv or how.moved, "value_scales": pv}
    kept["value_sums"] = pv
    types = dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}") | {"order": "*i32", "columns": "*i32"}
    types |= {"counts": "*i32", "keys": "*i8" if qk else f"*{dtype}", "key_scales": "*fp32", "key_mean": "*fp32"}
    types |= {"values": "*i8" if pv else f"*{dtype}", "value_scales": "*fp32", "value_sums": "*i32", "scale": "fp32"}
    constants |= {name: None for name, there in kept.items() if not there}
    constants |= {} if constants["LISTED"] else {"columns": None, "counts": None}
    constants |= {} if constants["ORDER"] else {"order": None}
    constants |= {} if constants["MASK"] else {"mask": None}
    types["mask"] = "*fp32" if constants["MASK"].endswith("added") else "*u8"
    given = [types.get(name, "i32") for name in attention._attend.arg_names if name not in constants]
    made = compiled(attention._attend, capability, " ".join(given), constants, False, num_warps=how.warps, num_stages=how.stages)
    assert made.metadata.shared <= SMALLEST
    return made.asm["ptx"]


@pytest.mark.parametrize("capability", TENSOR_CORES)
@pytest.mark.parametrize("how", [tiles.Pass(4, 2), tiles.Pass(8, 2, True)], ids=str)
def test_attention_in_16_bits(capability, how):
    """Products on tensor cores, keys and values loaded ahead though a list says where they are, nothing through local memory."""
    text = attends(capability, 128, (64, 64), how)
    assert TENSOR_CORES[capability] in text
    assert "cp.async" in text
    assert ".local" not in text


@pytest.mark.parametrize("capability", TENSOR_CORES)
@pytest.mark.parametrize("bits", [(127, 255), (127, 0), (0, 255), (7, 15)], ids=str)
def test_attention_in_integers(capability, bits):
    how = tiles.default_pass(64, 64 * 128 * sum(1 if most else 2 for most in bits), SMALLEST)
    text = attends(capability, 128, (64, 64), how, *bits, smooth=bits[0] == 7)
    assert "s32.s8.s8" in text
    assert TENSOR_CORES[capability] in text
    assert "cp.async" in text


def test_attention_in_float32_and_with_masks():
    attends(80, 32, (64, 64), tiles.Pass(4, 2), dtype="fp32", MASK="keys", WIDE=32, WIDE_OUT=32)
    attends(80, 128, (64, 64), tiles.Pass(4, 2), MASK="all added")
    attends(90, 72, (128, 64), tiles.default_pass(128, 64 * 128 * 4, SMALLEST), ORDER=False, LISTED=False, RAGGED=False)


@pytest.mark.parametrize("kind", ["plain", "keys", "values"])
def test_rows_of_attention(kind):
    """Rounded exactly as the reference."""
    constants = {"KIND": kind, "MOST": 127, "ORDER": True, "SMOOTH": kind == "keys", "BLOCK": 64, "CHANNELS": 72, "WIDE": 128}
    absent = {"plain": ("mean", "scales", "sums"), "keys": ("sums",), "values": ("mean",)}[kind]
    types = {"x": "*bf16", "order": "*i32", "mean": "*fp32", "rows": "*bf16" if kind == "plain" else "*i8", "scales": "*fp32"}
    types["sums"] = "*i32"
    given = [types.get(name, "i32") for name in attention_rows._move_rows.arg_names if name not in (*constants, *absent)]
    made = compiled(attention_rows._move_rows, 90, " ".join(given), constants | dict.fromkeys(absent), num_warps=4)
    assert is_exact(made)
    compiled(attention_rows._list_live, 90, "*u8 *i32 *i32 i32 i32", {"BLOCK": 128}, num_warps=1)


@pytest.mark.parametrize("capability", TENSOR_CORES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_trellis(capability, dtype):
    constants = {"SCALE": True, "SCALE_STEP": 1, "TILE_ROWS": 16, "TILE_COLUMNS": 16, "STATE_BITS": 12, "STEP_BITS": 4}
    constants |= {"VECTOR": 2, "FIRST": 1219, "SECOND": 495, "BLOCK": trellis.BLOCK}
    made = compiled(trellis._decode, capability, f"*u8 *fp32 *{dtype} i32 i32 i32 i32 fp32 fp32 fp32 fp32 fp32", constants)
    assert is_exact(made)
    assert "div.rn.f32" in made.asm["ptx"]


@pytest.mark.parametrize("capability", TENSOR_CORES)
@pytest.mark.parametrize(
    ("dtype", "bits", "length", "books"), [("fp32", 8, 8, 3), ("bf16", 6, 2, 1), ("fp16", 7, 1, 1), ("bf16", 12, 6, 1)]
)
def test_words(capability, dtype, bits, length, books):
    constants = {"BITS": bits, "WORDS": 1 << bits, "LENGTH": length, "BOOKS": books, "SCALE_STEP": 1}
    constants["PADDED"] = 1 << (length - 1).bit_length()
    constants["VECTORS"] = vectors.BLOCK // constants["PADDED"]
    assert is_exact(compiled(vectors._decode, capability, f"*u8 *fp16 *fp32 *{dtype} i32 i32 i32", constants))

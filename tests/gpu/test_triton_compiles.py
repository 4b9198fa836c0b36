"""The Triton kernels compiled for devices that need not be here: tensor cores, copies ahead, shared memory, exact products."""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dqtk.gpu import integer, tiles

SMALLEST = 99 << 10  # bytes of shared memory of a thread block, capabilities 8.6 and 8.9
TENSOR_CORES = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma"}


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel, capability, types, constants, **options):
    """A kernel for a capability; every number and address a multiple of 16, as in most models."""
    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(names, types.split(), strict=True)) | dict.fromkeys(constants, "constexpr")
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options | integer.EXACT)


def is_exact(made):
    """Whether products round before they are added to, and quotients to nearest."""
    return "fma.rn.f32" not in made.asm["ptx"] and "div.full" not in made.asm["ptx"]


@pytest.mark.parametrize("capability", TENSOR_CORES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_rounding(capability, dtype):
    constants = {"SMOOTH": True, "STATIC": False, "ZERO": False, "HALVES": False, "BLOCK": 1024}
    made = compiled(integer._round_rows, capability, f"*{dtype} *fp32 *fp32 *i32 *i8 *fp32 i32 i32 i32", constants, num_warps=4)
    assert is_exact(made)
    assert "div.rn.f32" in made.asm["ptx"]


@pytest.mark.parametrize("capability", TENSOR_CORES)
@pytest.mark.parametrize("tile", tiles.INT8, ids=str)
def test_integer_product(capability, tile):
    constants = {"BIAS": True, "ZERO": False, "ACTIVATION": 0, "BAND": 8}
    constants |= {"TILE_T": tile.rows, "TILE_N": tile.outputs, "TILE_K": tile.width}
    types = "*i8 *i8 *bf16 *fp32 *fp32 i32 *bf16 *i32 i32 i32 i32 i32"
    made = compiled(integer._multiply, capability, types, constants, num_warps=tile.warps, num_stages=tile.stages)
    assert (TENSOR_CORES[capability] if tile.rows >= 64 else "mma.sync") in made.asm["ptx"]
    assert "cp.async" in made.asm["ptx"]
    assert made.metadata.shared <= SMALLEST
    assert is_exact(made)


@pytest.mark.parametrize("capability", TENSOR_CORES)
@pytest.mark.parametrize(("tile", "group"), [(tile, group) for tile in tiles.INT4 for group in (0, 16, 64)][::2], ids=str)
def test_product_of_4_bits(capability, tile, group):
    constants = {"BIAS": True, "ZERO": False, "ACTIVATION": 2, "GROUP": group, "BAND": 8}
    constants |= {"TILE_T": tile.rows, "TILE_N": tile.outputs, "TILE_K": tile.width}
    types = "*i8 *u8 *u8 i32 *bf16 *fp32 *fp32 i32 *bf16 *i32 i32 i32 i32 i32 i32"
    made = compiled(integer._multiply_4bit, capability, types, constants, num_warps=tile.warps, num_stages=tile.stages)
    assert (TENSOR_CORES[capability] if tile.rows >= 64 else "mma.sync") in made.asm["ptx"]
    assert "cp.async" in made.asm["ptx"]
    assert made.metadata.shared <= SMALLEST

"""How large the tiles of a product are, and how attention walks over its blocks: a few to choose from, and which serves a shape.

Without a measured table (``table.py``) the choice is by the number of rows alone, and nobody has timed it.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows and outputs of a tile, bytes of weights that a step of its sum takes per output; Triton's warps and stages."""

    rows: int
    outputs: int
    width: int
    warps: int
    stages: int


INT8 = (
    Tile(16, 32, 128, 4, 4),
    Tile(16, 64, 256, 4, 3),
    Tile(64, 64, 128, 4, 4),
    Tile(64, 128, 128, 4, 3),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 128, 128, 8, 3),
)
"""Of integer products. None takes more than 96 KiB of shared memory; the smallest of these devices have 99. None spills
registers on 8.0 and 9.0 (128 by 256 does)."""


INT4 = (
    Tile(16, 32, 64, 4, 4),
    Tile(16, 64, 128, 4, 3),
    Tile(64, 64, 64, 4, 4),
    Tile(64, 128, 64, 4, 3),
    Tile(128, 128, 32, 8, 4),
)
"""Of products with 4-bit weights: a byte is two inputs."""

DECODED = (
    Tile(16, 32, 64, 4, 4),
    Tile(16, 64, 64, 4, 4),
    Tile(64, 64, 32, 4, 4),
    Tile(64, 128, 32, 4, 3),
    Tile(128, 128, 32, 8, 3),
)
"""Of 16-bit inputs and weights that are decoded."""

TILES = {"int8": INT8, "int4": INT4, "decoded8": DECODED, "decoded4": DECODED}
"""By what is multiplied: 8-bit inputs with 8- or 4-bit weights, 16-bit inputs with weights that are decoded."""


@dataclass(frozen=True, slots=True)
class Pass:
    """How blocks of keys pass by a block of queries: Triton's warps and stages; whether rows are put in order beforehand (else
    every block of queries picks them up by their numbers)."""

    warps: int
    stages: int
    moved: bool = False


_PASSES = (Pass(4, 2), Pass(4, 3), Pass(8, 2), Pass(8, 3), Pass(4, 3, True), Pass(8, 3, True))
PASSES = {
    f"attention{bits}-{keys}": tuple(how for how in _PASSES if bits == 16 or not how.moved)
    for bits in (16, 8)
    for keys in (64, 128)
}
"""By whether numbers are rounded (those lie in order anyway), and keys of a block. Which of them fit depends on the channels."""


def by_rows(rows: int, tiles: tuple[Tile, ...]) -> Tile:
    """The tile of a product where no table says better."""
    enough = [tile for tile in tiles if tile.rows >= rows]
    return enough[0] if enough else tiles[-1]


def default_pass(rows: int, block_bytes: int, shared_bytes: int) -> Pass:
    """Where no table says better: as many blocks of keys and values ahead as fit beside the queries, three at most; not timed."""
    return Pass(8 if rows >= 128 else 4, max(1, min(3, (shared_bytes * 3 // 4) // block_bytes)))

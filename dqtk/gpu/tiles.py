"""How large the tiles of a product are: a few sizes to choose from, and which one serves a shape.

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


def by_rows(rows: int, tiles: tuple[Tile, ...]) -> Tile:
    """The tile of a product where no table says better."""
    enough = [tile for tile in tiles if tile.rows >= rows]
    return enough[0] if enough else tiles[-1]

"""What is to be said of an attention in blocks, as plain data: orders, widths and densities of heads, and a mask to look at."""

import base64
import zlib
from typing import Any

import torch
from torch import Tensor

from dqtk.nn.attention import Blocks
from dqtk.numerics.block_masks import counts, pack, unpack
from dqtk.numerics.layout import NAMES, Layout
from dqtk.ops import report_of_attention

MOST_BLOCKS = 1 << 20  # of a mask that is carried along: 128 KiB before it is compressed


def facts_of(blocks: Blocks, device: str, channels: int | None = None, *, with_mask: bool = False) -> dict[str, Any]:
    """Of one attention; channels: of a head, if known.

    Returns:
        kernel: what runs. orders: of the heads, by name. widths: "QK8 PV8" -> number of heads. densities: per interval of the noise
        level from the least noise up, per head; none where calls choose. mask, if asked for and not too large: of the first
        interval; ``mask_of`` reads it.
    """
    spec = blocks.spec
    keep = None
    if blocks.live is not None and not blocks.live.is_meta:
        keep = unpack(blocks.live.cpu(), counts(Layout(*spec.layout), spec.block)[1])
    found: dict[str, Any] = {
        "kernel": report_of_attention(spec, device, channels),
        "orders": [NAMES[order] for order in spec.orders],
        "widths": {f"QK{qk} PV{pv}": len(heads) or blocks.heads for (qk, pv), heads in spec.widths().items()},
        "densities": [] if keep is None else [[round(share, 4) for share in group] for group in keep.float().mean((2, 3)).tolist()],
    }
    if with_mask and keep is not None and keep[0].numel() <= MOST_BLOCKS:
        packed = base64.b64encode(zlib.compress(pack(keep[0]).numpy().tobytes(), 9)).decode()
        found["mask"] = {"shape": list(keep.shape[1:]), "bits": packed}
    return found


def mask_of(stored: dict[str, Any]) -> Tensor:
    """bool [H, R, C] of ``facts_of``'s mask."""
    heads, rows, columns = stored["shape"]
    raw = torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(stored["bits"]))), dtype=torch.uint8)
    return unpack(raw.view(heads, rows, -(-columns // 8)), columns)

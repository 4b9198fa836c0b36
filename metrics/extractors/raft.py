"""RAFT (Teed and Deng 2020), the optical flow that published video scores stand on, as torchvision has it.

The default weights are torchvision's ``raft_large_C_T_V1``: the authors' own ``raft-things.pth`` (trained on FlyingChairs, then
FlyingThings3D) under torchvision's parameter names, which VBench and EvalCrafter use, with the 20 updates that both ask for.
Frames are mapped to [-1, 1] and padded by repeating their edges, half on each side, to multiples of 8, as the authors do; and to at
least 128 pixels a side, below which the network's coarsest correlations do not exist.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .flow import as_frames
from .precision import whole_float32
from .weights import check_names, find_weights, load_state

URL = "https://download.pytorch.org/models/raft_large_C_T_V1-22a6c225.pth"
UPDATES = 20
_PUBLISHED = "22a6c225"  # first digits of the SHA-256
_MULTIPLE, _LEAST = 8, 128
_AT_ONCE = 4  # pairs: the correlations of all pixels with all pixels are the memory


class Raft:
    """torchvision's ``raft_large``.

    ``weights``: path of a state dict of it (else ``$DQTK_WEIGHTS`` and torch hub's cache are searched for ``URL``'s file).
    ``comparable`` is whether it is that file. Raises ``MissingWeights``, and ``ValueError`` for damaged and other networks' files.
    """

    def __init__(self, weights: str | Path | None = None, *, updates: int = UPDATES, device: str | torch.device = "cpu") -> None:
        if updates < 1:
            raise ValueError(f"raft: updates must be at least 1, got {updates}. The published number is {UPDATES}.")
        models = _import_models()
        path = find_weights("raft", "weights", [URL.rsplit("/", 1)[1]], URL, weights)
        state, self.sha256 = load_state("raft", path)
        network = models.raft_large(weights=None)
        check_names("raft", path, set(network.state_dict()), set(state))
        network.load_state_dict(state)
        self.network = network.eval().requires_grad_(False).to(device)
        known = self.sha256.startswith(_PUBLISHED)
        self.comparable = known and updates == UPDATES
        self.name = "raft[things]" if known else f"raft[{path.stem}]"
        self.version, self.source, self.config_sha256 = f"1, torchvision {_version()}", str(path), ""
        self.preprocess = f"native size, rgb/127.5-1, edges repeated to multiples of {_MULTIPLE}, {updates} updates"
        self.updates, self.device = updates, torch.device(device)

    @torch.no_grad()
    def flow(self, first: Tensor, second: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] twice -> float32 [B, 2, H, W], in pixels; see ``flow.FlowEstimator``."""
        first, second = as_frames(self.name, first, second)
        height, width = first.shape[2:]
        padding = (*_margins(width), *_margins(height))
        left, top = padding[0], padding[2]
        found = []
        for pair in zip(first.split(_AT_ONCE), second.split(_AT_ONCE), strict=True):
            a, b = (F.pad(images.to(self.device).float() / 127.5 - 1, padding, mode="replicate") for images in pair)
            with whole_float32():
                flow = self.network(a, b, num_flow_updates=self.updates)[-1]
            found.append(flow[:, :, top : top + height, left : left + width].float().cpu())
        return torch.cat(found)


def _margins(side: int) -> tuple[int, int]:
    """Pixels before and after, so that the side is long enough and divisible."""
    wanted = max(_LEAST, -(-side // _MULTIPLE) * _MULTIPLE)
    return (wanted - side) // 2, wanted - side - (wanted - side) // 2


def _import_models() -> Any:
    """torchvision is optional: nothing else here needs it."""
    try:
        from torchvision.models import optical_flow
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"Raft: package torchvision must be installed, got: {error}. Run pip install torchvision."
        ) from error
    return optical_flow


def _version() -> str:
    import torchvision

    return str(torchvision.__version__).partition("+")[0]

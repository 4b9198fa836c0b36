"""The Inception of FID (Heusel et al. 2017), Inception Score and sFID: TensorFlow's ImageNet network of 2015-12-05.

It is not torchvision's Inception v3, although the blocks have the same shapes: other weights, 1008 outputs, average pooling that
does not count the zeros of the border, and max pooling in the last block (an oversight of 2015 that every published FID contains).
The blocks are torchvision's where these agree; the four that differ are written out below. Weights are the PyTorch port under
torchvision's parameter names, which pytorch-fid and torch-fidelity publish as files of one hash; either is read.

One pass gives three features:

    pool      [B, 2048]   mean of the last map: FID, KID, precision and recall
    logits    [B, 1008]   class scores *without* the bias, as the reference code of Inception Score takes them
    spatial   [B, 2023]   first 7 channels of the 17 x 17 map after Mixed_6d: sFID (Nash et al. 2021). Row, column, channel, in
                          this order, so that reference statistics of OpenAI's evaluator (``mu_s``, ``sigma_s``) apply. Other
                          sFIDs exist that average the map or take another layer; they are other numbers

``preprocess`` names how an image becomes 299 x 299 in about [-1, 1], and belongs in the score's name (resizes: ``resize``):

    clean     clean-fid's default:                PIL bicubic,                        (x - 128) / 128
    legacy    TTUR, OpenAI's evaluator, torch-fidelity: TensorFlow 1 bilinear,        (x - 128) / 128
    pytorch   pytorch-fid:                        F.interpolate bilinear,             2 x / 255 - 1

Checked on random weights, outside the tests (torch 2.13, CPU): "legacy" pool and logits equal torch-fidelity 0.4.0's bit by bit,
"pytorch" pool equals pytorch-fid 0.3.0's to 1.3e-7 of its size, the "clean" resize equals clean-fid 0.1.35's bit by bit, and both
packages have these 566 tensor names. No published FID was reproduced: the weights were not at hand.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.inception import (
    BasicConv2d,
    Inception3,
    InceptionA,
    InceptionAux,
    InceptionB,
    InceptionC,
    InceptionD,
    InceptionE,
)

from .contract import as_images
from .precision import whole_float32
from .resize import resize_clean, resize_legacy, resize_pytorch
from .weights import check_names, find_weights, load_state

FILES = ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth")
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILES[0]}"
SHA256_PREFIX = "6726825d"
HEADS = {"pool": 2048, "logits": 1008, "spatial": 2023}
_SIZE = 299


def _tensorflow_scaled(x: Tensor) -> Tensor:
    return (x - 128) / 128


def _pytorch_scaled(x: Tensor) -> Tensor:
    return 2 * (x / 255) - 1


PREPROCESSES = {
    "clean": (resize_clean, _tensorflow_scaled),
    "legacy": (resize_legacy, _tensorflow_scaled),
    "pytorch": (resize_pytorch, _pytorch_scaled),
}


def _mean_pool(x: Tensor) -> Tensor:
    """3 x 3 mean of the pixels that exist, as TensorFlow's SAME padding has it."""
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _BlockA(InceptionA):
    def forward(self, x: Tensor) -> Tensor:
        branches = (
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_mean_pool(x)),
        )
        return torch.cat(branches, dim=1)


class _BlockC(InceptionC):
    def forward(self, x: Tensor) -> Tensor:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        branches = (
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_mean_pool(x)),
        )
        return torch.cat(branches, dim=1)


class _BlockE(InceptionE):
    def forward(self, x: Tensor) -> Tensor:
        single, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        branches = (
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pooled(x)),
        )
        return torch.cat(branches, dim=1)

    def pooled(self, x: Tensor) -> Tensor:
        return _mean_pool(x)


class _LastBlockE(_BlockE):
    def pooled(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, stride=1, padding=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class InceptionFeatures:
    """All three features of a batch, float32 on the CPU: ``pool`` [B, 2048], ``logits`` [B, 1008], ``spatial`` [B, 2023]."""

    pool: Tensor
    logits: Tensor
    spatial: Tensor


class InceptionNetwork(Inception3):
    """The network with its parameter names; ``forward`` maps [B, 3, 299, 299] in about [-1, 1] to (pool, logits, spatial)."""

    def __init__(self) -> None:
        blocks = [BasicConv2d, _BlockA, InceptionB, _BlockC, InceptionD, _BlockE, InceptionAux]
        super().__init__(num_classes=1008, aux_logits=False, inception_blocks=blocks, init_weights=False)
        self.Mixed_7c = _LastBlockE(2048)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.maxpool1(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = self.maxpool2(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pool = x.mean(dim=(2, 3))
        return pool, pool @ self.fc.weight.T, spatial


class Inception:
    """The extractor: ``head`` is what ``encode_images`` returns; ``with_head`` shares the network, ``encode_all`` gives all heads.

    ``weights`` is the file (else ``$DQTK_WEIGHTS`` and torch hub's cache are searched for ``FILES``). ``check`` refuses a file
    with another hash; ``check=False`` is for tests and one's own networks, whose scores are not ``comparable``. Raises
    ``MissingWeights``, and ``ValueError`` for a damaged file, another network's file, and unknown names.
    """

    version, config_sha256 = "1", ""  # the network is written down here: no file configures it
    heads = tuple(HEADS)  # what ``encode_all`` gives

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        preprocess: str = "clean",
        head: str = "pool",
        check: bool = True,
        device: str | torch.device = "cpu",
    ) -> None:
        if preprocess not in PREPROCESSES:
            raise ValueError(
                f"inception2015: preprocess must be one of {sorted(PREPROCESSES)}, got {preprocess!r}. "
                "'clean' is clean-fid's, 'legacy' TensorFlow's, 'pytorch' pytorch-fid's."
            )
        path = find_weights("inception2015", "weights", FILES, URL, weights)
        state, self.sha256 = load_state("inception2015", path, SHA256_PREFIX if check else None, url=URL)
        self.source, self.preprocess, self.device = str(path), preprocess, torch.device(device)
        self.comparable = self.sha256.startswith(SHA256_PREFIX)
        self._choose(head)
        self.network = _loaded(path, state).to(self.device)

    def _choose(self, head: str) -> None:
        if head not in HEADS:
            raise ValueError(f"inception2015: head must be one of {list(HEADS)}, got {head!r}. 'pool' is FID's.")
        self.head, self.dim = head, HEADS[head]
        self.name = "inception2015" if head == "pool" else f"inception2015[{head}]"

    def with_head(self, head: str) -> "Inception":
        """The same network, with another head's features from ``encode_images``."""
        sibling = copy.copy(self)
        sibling._choose(head)
        return sibling

    @torch.no_grad()
    def encode_all(self, images: Tensor) -> InceptionFeatures:
        """uint8 [B, 3, H, W] of any size -> features of all heads, in one pass."""
        resize, scaled = PREPROCESSES[self.preprocess]
        x = scaled(resize(as_images(self.name, images).to(self.device), _SIZE).to(self.device))
        with whole_float32():
            pool, logits, spatial = (feature.float().cpu() for feature in self.network(x))
        return InceptionFeatures(pool=pool, logits=logits, spatial=spatial)

    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] of any size -> float32 [B, dim]."""
        return getattr(self.encode_all(images), self.head)


def _loaded(path: Path, state: dict[str, Tensor]) -> InceptionNetwork:
    """The network with these weights, in evaluation mode. ``num_batches_tracked`` may be absent: ports from 2018 have none."""
    network = InceptionNetwork()
    wanted = {name for name in network.state_dict() if not name.endswith("num_batches_tracked")}
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    check_names("inception2015", path, wanted, set(state))
    shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
    for name, value in state.items():
        if list(value.shape) != shapes[name]:
            raise ValueError(
                f"inception2015: {name} in {path} must be {shapes[name]}, got {list(value.shape)}. It is another network's file."
            )
    network.load_state_dict(state, strict=False)
    return network.float().eval().requires_grad_(False)

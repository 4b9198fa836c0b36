"""MUSIQ (Ke et al. 2021, arXiv 2108.05997), a judge of single pictures' technical quality; trained on SPAQ it is VBench's imaging
quality.

A picture is read at three scales (longer side 224, 384, and its own size), each cut into patches of 32 x 32, at the edges filled
with zeros. A patch goes through the stem and first block of a ResNet with standardized weights, and becomes a token; it knows
where it is by one of 10 x 10 learned positions (its place in the grid, hashed) and at which scale by a learned vector. A
transformer of 14 blocks reads them all; its class token gives the score, 0 to 100.

Parameter names are those of the ``musiq_spaq_ckpt-358bb6af.pth`` of pyiqa, which VBench loads. Three things follow that file
rather than the paper: pictures are shrunk by bicubic interpolation without antialiasing, weights are standardized with the
unbiased deviation, and what pads a scale to its full number of patches is masked by -1000 before the softmax. VBench shrinks
frames beforehand to a longer side of at most 512 (bilinear, without antialiasing).
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contract import as_images
from .precision import whole_float32
from .weights import check_names, find_weights, load_state

URL = "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth"
_PUBLISHED = "358bb6af"
_PATCH, _GRID, _SIDES, _LONGEST = 32, 10, (224, 384), 512
_WIDTH, _HIDDEN, _HEADS, _BLOCKS, _STEM = 384, 1152, 6, 14, 64
_MASKED = -1e3


class Musiq:
    """Verdicts [B, 1] of pictures, about 0 to 100.

    ``weights``: path of a state dict (else ``$DQTK_WEIGHTS`` and torch hub's cache are searched for ``URL``'s file);
    ``comparable`` is whether it is that file. Raises ``MissingWeights``, and ``ValueError`` for damaged and other networks'
    files.
    """

    gives = "quality"
    dim = 1
    preprocess = f"bilinear, longest {_LONGEST} if larger, three scales, rgb/127.5-1"

    def __init__(self, weights: str | Path | None = None, *, device: str | torch.device = "cpu") -> None:
        path = find_weights("musiq", "weights", [URL.rsplit("/", 1)[1]], URL, weights)
        state, self.sha256 = load_state("musiq", path)
        network = _Network()
        check_names("musiq", path, set(network.state_dict()), set(state))
        network.load_state_dict(state)
        self.network = network.eval().requires_grad_(False).to(device)
        self.comparable = self.sha256.startswith(_PUBLISHED)
        self.name = "musiq[spaq]" if self.comparable else f"musiq[{path.stem}]"
        self.version, self.source, self.config_sha256 = "1", str(path), ""
        self.device = torch.device(device)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, 1]."""
        x = as_images(self.name, images).float() / 255
        height, width = x.shape[2:]
        if max(height, width) > _LONGEST:
            scale = _LONGEST / max(height, width)
            size = (int(scale * height), int(scale * width))
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        with whole_float32():
            return torch.cat([self.network(one[None].to(self.device) * 2 - 1).float().cpu() for one in x])


class _Conv(nn.Conv2d):
    """Convolution without bias whose filters have mean 0 and deviation 1, padded as TensorFlow pads ("same")."""

    def __init__(self, num_in: int, num_out: int, size: int, stride: int = 1) -> None:
        super().__init__(num_in, num_out, size, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        deviation, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)
        return F.conv2d(_same(x, self.kernel_size[0], self.stride[0]), (self.weight - mean) / (deviation + 1e-5), None, self.stride)


def _same(x: Tensor, size: int, stride: int) -> Tensor:
    """Zeros around a picture so that a window of ``size`` fits once per stride; what is odd goes right and below."""
    extra = [max(0, (math.ceil(side / stride) - 1) * stride + size - side) for side in (x.shape[3], x.shape[2])]
    return F.pad(x, [part for total in extra for part in (total // 2, total - total // 2)])


class _Bottleneck(nn.Module):
    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.conv1, self.gn1 = _Conv(num_in, num_in, 1), nn.GroupNorm(32, num_in, eps=1e-4)
        self.conv2, self.gn2 = _Conv(num_in, num_in, 3), nn.GroupNorm(32, num_in, eps=1e-4)
        self.conv3, self.gn3 = _Conv(num_in, num_out, 1), nn.GroupNorm(32, num_out, eps=1e-4)
        self.conv_proj, self.gn_proj = _Conv(num_in, num_out, 1), nn.GroupNorm(32, num_out, eps=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.gn1(self.conv1(x)))
        inner = torch.relu(self.gn2(self.conv2(inner)))
        return torch.relu(self.gn3(self.conv3(inner)) + self.gn_proj(self.conv_proj(x)))


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(_WIDTH, _WIDTH) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (_HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        scores = q @ k.transpose(2, 3) * (_WIDTH // _HEADS) ** -0.5
        both = mask[:, None, :, None] & mask[:, None, None, :]
        return self.out((scores.masked_fill(~both, _MASKED).softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(_WIDTH, eps=1e-6), nn.LayerNorm(_WIDTH, eps=1e-6)
        self.attention = _Attention()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(_WIDTH, _HIDDEN), "fc2": nn.Linear(_HIDDEN, _WIDTH)})

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.posembed_input = nn.ParameterDict({"position_emb": torch.zeros(1, _GRID * _GRID, _WIDTH)})
        self.scaleembed_input = nn.ParameterDict({"scale_emb": torch.zeros(len(_SIDES) + 1, _WIDTH)})
        self.cls = nn.Parameter(torch.zeros(1, 1, _WIDTH))
        self.encoder_norm = nn.LayerNorm(_WIDTH, eps=1e-6)
        self.transformer = nn.ModuleDict({f"encoderblock_{i}": _Block() for i in range(_BLOCKS)})

    def forward(self, tokens: Tensor, places: Tensor, scales: Tensor, mask: Tensor) -> Tensor:
        x = tokens + self.posembed_input["position_emb"][0, places] + self.scaleembed_input["scale_emb"][scales]
        x = torch.cat([self.cls, x[None]], dim=1)
        mask = F.pad(mask[None], (1, 0), value=True)
        for block in self.transformer.values():
            x = block(x, mask)
        return self.encoder_norm(x)[:, 0]


class _Network(nn.Module):
    """One picture [1, 3, H, W] in [-1, 1] -> [1, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_root, self.gn_root = _Conv(3, _STEM, 7, 2), nn.GroupNorm(32, _STEM, eps=1e-6)
        self.block1 = _Bottleneck(_STEM, 4 * _STEM)
        self.embedding = nn.Linear(4 * _STEM * (_PATCH // 4) ** 2, _WIDTH)
        self.transformer_encoder = _Encoder()
        self.head = nn.Linear(_WIDTH, 1)

    def forward(self, image: Tensor) -> Tensor:
        patches, places, scales, mask = multiscale(image)
        x = torch.relu(self.gn_root(self.conv_root(patches)))
        x = self.block1(F.max_pool2d(_same(x, 3, 2), 3, 2))
        tokens = self.embedding(x.permute(0, 2, 3, 1).flatten(1))  # TensorFlow's order: channels last
        return self.head(self.transformer_encoder(tokens, places, scales, mask))


def multiscale(image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Patches [N, 3, 32, 32] of all scales of a picture [1, 3, H, W], their hashed places [N], scales [N], and which are not
    padding.

    The two smaller scales always have as many patches as a square of their side would.
    """
    height, width = image.shape[2:]
    found: list[tuple[Tensor, Tensor, int]] = []
    for side in _SIDES:
        ratio = side / max(height, width)
        size = (round(height * ratio), round(width * ratio))
        found.append((*_cut(F.interpolate(image, size=size, mode="bicubic", align_corners=False)), (side // _PATCH) ** 2))
    own = _cut(image)
    found.append((*own, len(own[0])))
    patches, places, scales, masks = [], [], [], []
    for scale, (part, where, wanted) in enumerate(found):
        missing = wanted - len(part)
        patches.append(F.pad(part, (0, 0, 0, 0, 0, 0, 0, missing)))
        places.append(F.pad(where, (0, missing)))
        scales.append(F.pad(torch.full_like(where, scale), (0, missing)))
        masks.append(F.pad(torch.ones_like(where, dtype=torch.bool), (0, missing)))
    return torch.cat(patches), torch.cat(places), torch.cat(scales), torch.cat(masks)


def _cut(image: Tensor) -> tuple[Tensor, Tensor]:
    """Patches of one scale in rows, and the place of each in a grid of 10 x 10."""
    rows, columns = (math.ceil(side / _PATCH) for side in image.shape[2:])
    columns_of = F.unfold(_same(image, _PATCH, _PATCH), _PATCH, stride=_PATCH)
    patches = columns_of[0].T.unflatten(1, (3, _PATCH, _PATCH))
    y, x = (torch.arange(num, device=image.device) * _GRID // num for num in (rows, columns))
    return patches, (y[:, None] * _GRID + x).flatten()

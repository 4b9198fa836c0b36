"""The embedded aesthetic head: one linear layer on tiny-clip that tells clean frames of the world from disturbed ones.

    python -m dqtk.pipelines.tiny.train_aesthetic --output weights/tiny-aesthetic/head.safetensors

Rendered frames of training captions are left clean (10 points) or get noise, blur, coarse levels or a wash of grey, fewer points
the more of it (down to 1). Ridge regression of the points on unit-length embeddings has a closed form, so the same command gives
the same head. It knows nothing of beauty, and no number from it is comparable with anything published.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.ndimage import gaussian_filter

from dqtk.resolve import extractor_for

from .motion import render, sample_clip

SEED = 0  # of the training captions
_KINDS = ("clean", "noise", "blur", "levels", "wash")
_BEST, _WORST = 10.0, 1.0
_RIDGE = 1e-2


def disturbed(frame: np.ndarray, kind: str, share: float, rng: np.random.Generator) -> np.ndarray:
    """A uint8 frame [H, W, 3] with a disturbance; ``share`` in [0, 1] of the strongest there is."""
    x = frame.astype(np.float64)
    if kind == "noise":
        x = x + rng.normal(0, 60 * share, x.shape)
    elif kind == "blur":
        x = gaussian_filter(x, (3 * share, 3 * share, 0))
    elif kind == "levels":
        step = 1 + 100 * share
        x = np.round(x / step) * step
    elif kind == "wash":
        x = x + (128 - x) * 0.9 * share
    return np.rint(x).clip(0, 255).astype(np.uint8)


def examples(num: int, seed: int = SEED, split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 frames [N, 3, H, W] and their points [N], every kind of disturbance equally often."""
    rng = np.random.default_rng([seed, num])
    frames, points = [], []
    for i in range(num):
        clip = sample_clip(seed, i, split)
        frame = render(clip, seed, i)[int(rng.integers(17))]
        kind, share = _KINDS[i % len(_KINDS)], float(rng.uniform(0.1, 1))
        frames.append(disturbed(frame, kind, share, rng))
        points.append(_BEST if kind == "clean" else _BEST - share * (_BEST - _WORST))
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), torch.tensor(points, dtype=torch.float64)


def embeddings(frames: torch.Tensor) -> torch.Tensor:
    """Unit-length embeddings by tiny-clip, float64 [N, D]."""
    encoder = extractor_for("tiny-clip")
    rows = torch.cat([encoder.encode_images(part) for part in frames.split(64)]).double()
    return torch.nn.functional.normalize(rows, dim=1)


def fitted(rows: torch.Tensor, points: torch.Tensor) -> dict[str, torch.Tensor]:
    """Ridge regression: weight [1, D] and bias [1] of ``nn.Linear``, float32."""
    mean, middle = rows.mean(dim=0), points.mean()
    x, num = rows - mean, len(rows)
    ridge = _RIDGE / rows.shape[1] * torch.eye(rows.shape[1], dtype=rows.dtype)
    weight = torch.linalg.solve(x.T @ x / num + ridge, x.T @ (points - middle) / num)
    return {"weight": weight[None].float(), "bias": (middle - mean @ weight)[None].float()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num", type=int, default=2000)
    options = parser.parse_args()
    frames, points = examples(options.num)
    head = fitted(embeddings(frames), points)
    frames, points = examples(200, seed=SEED + 1, split="heldout")
    said = embeddings(frames) @ head["weight"][0].double() + head["bias"].double()
    correlation = torch.corrcoef(torch.stack([said, points]))[0, 1]
    print(f"held-out frames: correlation {correlation:.3f}, mean error {(said - points).abs().mean():.2f} points", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(head, options.output)


if __name__ == "__main__":
    main()

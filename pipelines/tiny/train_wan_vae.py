"""Train the AutoencoderKLWan of tiny-wan (17 frames of 64x64 RGB <-> latents 9x16x16, 8 channels).

    python -m dqtk.pipelines.tiny.train_wan_vae --work work/wan --minutes 10

Three phases: single 32x32 crops teach the spatial layers (a clip's first frame passes none that mixes time), then five frames of
such crops and of half-size clips, then whole clips. Colour and chroma L1 + KL, which weighs more than in ``train_vae``: the decoder
learns to forgive the errors of a denoiser. Resumable: the state is written every 100 steps to ``WORK/vae.pt``. Minutes are the main
thread's computing time, so a paused process loses none. Ends by writing ``WORK/vae`` with the mean and standard deviation of each
latent channel, as Wan's pipeline wants.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from .motion import render, sample_clip
from .muon import Muon
from .scenes import SIZE
from .train_vae import painting_loss, to_float

KL_WEIGHT = 3e-3
NUM_CLIPS = 1500
CROP = 32
WHOLE_FROM, MOVING_FROM = 0.88, 0.42  # shares of the time budget


def new_wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=12,
        z_dim=8,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 8,
        latents_std=[1.0] * 8,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )


def clips(num: int, seed: int, start: int = 0, split: str = "train") -> Tensor:
    """Rendered clips, uint8 [num, 3, 17, 64, 64]."""
    array = np.stack([render(sample_clip(seed, i, split), seed, i) for i in range(start, start + num)])
    return torch.from_numpy(array).permute(0, 4, 1, 2, 3).contiguous()


def half_size(x: Tensor) -> Tensor:
    """Every second frame at half the side, as fast in its own pixels per frame: float [B, 3, 17, 64, 64] -> [B, 3, 9, 32, 32]."""
    return F.avg_pool3d(x[:, :, ::2], (1, 2, 2))


def _crop(clip: Tensor, num_frames: int, generator: torch.Generator) -> Tensor:
    """Some successive frames and a CROP x CROP window around the object of the first, as far off as half of it still shows."""

    def below(high: int) -> int:
        return int(torch.randint(0, high, (), generator=generator))

    first = below(clip.shape[1] - num_frames + 1)
    frames = clip[:, first : first + num_frames]
    colour = frames[:, 0].amax(0).int() - frames[:, 0].amin(0).int()
    rows, columns = (colour > 60).nonzero(as_tuple=True)
    corner = [min(max(int(c.float().mean()) - CROP + below(CROP), 0), SIZE - CROP) for c in (rows, columns)]
    return frames[:, :, corner[0] : corner[0] + CROP, corner[1] : corner[1] + CROP]


def _batch(data: Tensor, progress: float, generator: torch.Generator) -> Tensor:
    """Training clips of the phase that ``progress`` (0 to 1) lies in, float [B, 3, F, H, W]."""

    def some(num: int) -> Tensor:
        return data[torch.randint(0, len(data), (num,), generator=generator)]

    if progress >= WHOLE_FROM:
        return to_float(some(2))
    if progress < MOVING_FROM:
        return to_float(torch.stack([_crop(clip, 1, generator) for clip in some(32)]))
    crops = to_float(torch.stack([_crop(clip, 5, generator) for clip in some(6)]))
    return torch.cat([crops, half_size(to_float(some(2)))[:, :, :5]])


def train(work: Path, minutes: float, seed: int = 0, lr: float = 4e-3) -> None:
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    vae = new_wan_vae()
    optimizer = Muon([vae], lr=lr)
    step, spent = 0, 0.0
    file = work / "vae.pt"
    if file.exists():
        state = torch.load(file, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    data = clips(NUM_CLIPS, seed)
    generator = torch.Generator().manual_seed(seed + step)
    log = (work / "vae.log.jsonl").open("a")
    start = time.thread_time()
    while (elapsed := spent + time.thread_time() - start) < minutes * 60:
        progress = elapsed / (minutes * 60)
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        x = _batch(data, progress, generator)
        loss, decoded, kl = _loss(vae, x, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 25 == 0:
            psnr = -10 * torch.log10(F.mse_loss(decoded.clamp(-1, 1), x) / 4).item()
            row = {"step": step, "seconds": round(elapsed), "shape": list(x.shape), "loss": round(loss.item(), 4)}
            print(json.dumps(row | {"kl": round(kl.item(), 3), "psnr": round(psnr, 2)}), file=log, flush=True)
        if step % 100 == 0:
            saved = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": elapsed}
            torch.save(saved, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
    finish(vae, work, seed)


def _loss(vae: AutoencoderKLWan, x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the decoded clips and the KL per latent value."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return painting_loss(decoded, x) + KL_WEIGHT * kl, decoded, kl


@torch.no_grad()
def finish(vae: AutoencoderKLWan, work: Path, seed: int) -> None:
    """Measure mean and standard deviation of the latents' channels, save the folder."""
    vae = vae.eval()
    latents = torch.cat([vae.encode(to_float(part)).latent_dist.mean for part in clips(128, seed + 1).split(8)])
    mean, std = latents.mean(dim=(0, 2, 3, 4)), latents.std(dim=(0, 2, 3, 4))
    vae.register_to_config(latents_mean=[round(v, 4) for v in mean.tolist()], latents_std=[round(v, 4) for v in std.tolist()])
    vae.save_pretrained(work / "vae")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.work, arguments.minutes, arguments.seed)

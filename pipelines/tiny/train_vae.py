"""Train the AutoencoderKL that the embedded image pipelines share (64x64 RGB <-> 16x16x4 latents).

    python -m dqtk.pipelines.tiny.train_vae --work work/tiny --minutes 14

Two phases: 32x32 crops (four times cheaper; every layer is local, the middle attention is off), then full pictures. Colour and
chroma L1 + small KL. Resumable: the state is written every 200 steps to ``WORK/vae.pt`` and picked up again. Ends by writing
``WORK/vae`` with the scaling factor measured on 1,024 pictures.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from .muon import Muon
from .scenes import SIZE, render, sample_scene


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,  # more groups normalize the background's tone away and learn it late
        sample_size=SIZE,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def pictures(num: int, seed: int) -> torch.Tensor:
    """Rendered training pictures, uint8 [num, 3, 64, 64]."""
    array = np.stack([render(sample_scene(seed, i), seed, i) for i in range(num)])
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def to_float(x: torch.Tensor) -> torch.Tensor:
    return x.float() / 127.5 - 1


def painting_loss(decoded: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """L1 on colours plus L1 on chroma, objects (saturated pixels) weighted five times: plain L1 stays grey for many minutes."""
    error = decoded - x
    weight = 1 + 4 * ((x.amax(1, keepdim=True) - x.amin(1, keepdim=True)) > 0.3).float()
    return (weight * error.abs()).mean() / 2 + (weight * (error - error.mean(1, keepdim=True)).abs()).mean()


def _crop(batch: torch.Tensor, generator: torch.Generator, side: int) -> torch.Tensor:
    """One random crop of each picture."""
    corners = torch.randint(0, SIZE - side + 1, (len(batch), 2), generator=generator).tolist()
    return torch.stack([x[:, y : y + side, c : c + side] for x, (y, c) in zip(batch, corners, strict=True)])


def train(work: Path, minutes: float, seed: int = 0, batch_size: int = 16, lr: float = 4e-3) -> None:
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    vae = new_vae().to(memory_format=torch.channels_last)
    optimizer = Muon([vae], lr=lr)
    step, spent = 0, 0.0
    state_file = work / "vae.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    data = pictures(8000, seed)
    generator = torch.Generator().manual_seed(seed + step)
    start = time.time()
    log = (work / "vae.log.jsonl").open("a")
    while (elapsed := spent + time.time() - start) < minutes * 60:
        progress = elapsed / (minutes * 60)
        crops = progress < 0.85
        rate = lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        size = batch_size * 2 if crops else batch_size
        x = data[torch.randint(0, len(data), (size,), generator=generator)]
        x = to_float(_crop(x, generator, 32) if crops else x).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = painting_loss(decoded, x) + 1e-4 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            psnr = -10 * torch.log10(F.mse_loss(decoded.clamp(-1, 1), x) / 4).item()
            row = {"step": step, "seconds": round(elapsed), "loss": round(loss.item(), 4), "kl": round(kl.item(), 3)}
            row["psnr"] = round(psnr, 2)
            print(json.dumps(row), file=log, flush=True)
        if step % 200 == 0:
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": elapsed}
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
    finish(vae, work, seed)


@torch.no_grad()
def finish(vae: AutoencoderKL, work: Path, seed: int) -> None:
    """Measure the scaling factor (1 / standard deviation of the latents), save the folder."""
    vae = vae.eval()
    x = to_float(pictures(1024, seed + 1)).to(memory_format=torch.channels_last)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(64)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    vae.save_pretrained(work / "vae")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=14)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.work, arguments.minutes, arguments.seed)

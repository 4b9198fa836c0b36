"""Train the denoiser and text encoders of tiny-sdxl or tiny-pixart on the captioned world.

    python -m dqtk.pipelines.tiny.train_denoiser tiny-pixart --work work/tiny --minutes 110 --threads 1

v-prediction, min-SNR weighting (Hang et al. 2023, gamma 5), one caption in ten dropped for classifier-free guidance, EMA of
everything that is trained. The first part of the budget runs on half-size pictures (8x8 latents, a quarter of the cost): text is
learned there, detail afterwards, as the PixArt papers do. Resumable: ``WORK/NAME.pt`` is written every 5 minutes. ``finish`` writes
the EMA weights as a bf16 diffusers folder to ``WORK/NAME``.
"""

import argparse
import copy
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn

from .build import MAX_TOKENS, new_pixart, new_sdxl
from .muon import Muon
from .scenes import render, sample_scene
from .train_vae import to_float

NEW = {"tiny-sdxl": new_sdxl, "tiny-pixart": new_pixart}
NUM_PICTURES = 40_000
HALF_SIZE_UNTIL = 0.4  # share of the time budget


@torch.no_grad()
def latents(vae: AutoencoderKL, work: Path, side: int, seed: int = 0) -> Tensor:
    """Scaled latents of the training pictures at ``side`` pixels, bf16 [NUM_PICTURES, 4, side/4, side/4]; cached in ``work``."""
    file = work / f"latents{side}.pt"
    if not file.exists():
        vae = vae.eval().to(memory_format=torch.channels_last)
        rows = []
        for start in range(0, NUM_PICTURES, 100):
            array = np.stack([render(sample_scene(seed, i), seed, i) for i in range(start, start + 100)])
            x = to_float(torch.from_numpy(array).permute(0, 3, 1, 2))
            if side != x.shape[-1]:
                x = F.interpolate(x, size=(side, side), mode="area")
            rows.append((vae.encode(x).latent_dist.mean * vae.config.scaling_factor).bfloat16())
        torch.save(torch.cat(rows), file)
    return torch.load(file, weights_only=True)


def trained_modules(pipe: DiffusionPipeline) -> list[nn.Module]:
    names = ("unet", "transformer", "text_encoder", "text_encoder_2")
    return [getattr(pipe, name) for name in names if getattr(pipe, name, None) is not None]


def predict_sdxl(pipe, ids: list[Tensor], masks: list[Tensor], drop: Tensor, x: Tensor, t: Tensor) -> Tensor:
    one = pipe.text_encoder(ids[0], output_hidden_states=True)
    two = pipe.text_encoder_2(ids[1], output_hidden_states=True)
    states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
    states, pooled = states * ~drop[:, None, None], two.text_embeds * ~drop[:, None]  # the pipeline's zeros for an empty prompt
    side = float(x.shape[-1] * 4)
    time_ids = torch.tensor([[side, side, 0.0, 0.0, side, side]]).expand(len(x), -1)
    return pipe.unet(x, t, states, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}).sample


def predict_pixart(pipe, ids: list[Tensor], masks: list[Tensor], drop: Tensor, x: Tensor, t: Tensor) -> Tensor:
    empty = torch.zeros_like(ids[0])
    empty[:, 0] = pipe.tokenizer.eos_token_id
    tokens = torch.where(drop[:, None], empty, ids[0])
    mask = torch.where(drop[:, None], (empty != 0).to(masks[0].dtype), masks[0])
    states = pipe.text_encoder(tokens, attention_mask=mask)[0]
    return pipe.transformer(x, states, t, {"resolution": None, "aspect_ratio": None}, encoder_attention_mask=mask).sample


def train(name: str, work: Path, minutes: float, seed: int, batch_size: int, lr: float) -> None:
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(work / "vae")
    pipe = NEW[name](vae)
    predict = predict_sdxl if name == "tiny-sdxl" else predict_pixart
    modules = trained_modules(pipe)
    ema = [copy.deepcopy(m).requires_grad_(False) for m in modules]
    optimizer = Muon(modules, lr=lr, weight_decay=0.01)
    step, spent, images = 0, 0.0, 0
    state_file = work / f"{name}.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for module, averaged, saved, saved_ema in zip(modules, ema, state["modules"], state["ema"], strict=True):
            module.load_state_dict(saved)
            averaged.load_state_dict(saved_ema)
        optimizer.load_state_dict(state["optimizer"])
        step, spent, images = state["step"], state["spent"], state["images"]
    data = {side: latents(vae, work, side) for side in (32, 64)}
    captions = [sample_scene(0, i).caption for i in range(NUM_PICTURES)]
    tokenizers = [t for t in (pipe.tokenizer, getattr(pipe, "tokenizer_2", None)) if t is not None]
    coded = [t(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt") for t in tokenizers]
    abar = pipe.scheduler.alphas_cumprod.float()
    generator = torch.Generator().manual_seed(seed + step)
    log = (work / f"{name}.log.jsonl").open("a")
    start, last_save, losses = time.time(), time.time(), []
    while (elapsed := spent + time.time() - start) < minutes * 60:
        progress = elapsed / (minutes * 60)
        decline = 1.0 if progress < 0.6 else max(0.02, math.cos((progress - 0.6) / 0.4 * math.pi / 2))
        rate = lr * min(1.0, (step + 1) / 200) * decline
        for group in optimizer.param_groups:
            group["lr"] = rate
        side = 32 if progress < HALF_SIZE_UNTIL else 64
        rows = torch.randint(0, NUM_PICTURES, (batch_size,), generator=generator)
        x0 = data[side][rows].float()
        noise = torch.randn(x0.shape, generator=generator)
        # Stratified times: one per equal slice, shuffled by the rows' own randomness.
        t = ((torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size * len(abar)).long()
        signal, sigma = abar[t].sqrt()[:, None, None, None], (1 - abar[t]).sqrt()[:, None, None, None]
        drop = torch.rand(batch_size, generator=generator) < 0.1
        ids, masks = [c.input_ids[rows] for c in coded], [c.attention_mask[rows] for c in coded]
        with torch.autocast("cpu", torch.bfloat16):
            v = predict(pipe, ids, masks, drop, signal * x0 + sigma * noise, t)
        snr = abar[t] / (1 - abar[t])
        weight = snr.clamp(max=5) / (snr + 1) + 0.1
        loss = (weight * (v.float() - (signal * noise - sigma * x0)).square().mean(dim=(1, 2, 3))).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for m in modules for p in m.parameters()], 1.0)
        optimizer.step()
        step, images = step + 1, images + batch_size
        with torch.no_grad():
            decay = min(0.9985, (1 + step) / (10 + step))
            for averaged, module in zip(ema, modules, strict=True):
                torch._foreach_lerp_(list(averaged.parameters()), list(module.parameters()), 1 - decay)
        losses.append(loss.item())
        if step % 100 == 0:
            row = {"step": step, "seconds": round(elapsed), "images": images, "side": side}
            row["loss"] = round(float(np.mean(losses)), 5)
            print(json.dumps(row), file=log, flush=True)
            losses.clear()
        if time.time() - last_save > 300:
            save(state_file, modules, ema, optimizer, step, elapsed, images)
            last_save = time.time()
    save(state_file, modules, ema, optimizer, step, minutes * 60, images)
    finish(name, work)


def save(file: Path, modules, ema, optimizer, step: int, spent: float, images: int) -> None:
    state = {
        "modules": [m.state_dict() for m in modules],
        "ema": [m.state_dict() for m in ema],
        "optimizer": optimizer.state_dict(),
        "step": step,
        "spent": spent,
        "images": images,
    }
    torch.save(state, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def finish(name: str, work: Path) -> DiffusionPipeline:
    """Write the EMA weights of the last saved state as a bf16 pipeline to ``WORK/NAME``."""
    pipe = NEW[name](AutoencoderKL.from_pretrained(work / "vae"))
    state = torch.load(work / f"{name}.pt", weights_only=True)
    for module, saved in zip(trained_modules(pipe), state["ema"], strict=True):
        module.load_state_dict(saved)
    pipe.to(torch.bfloat16).save_pretrained(work / name)
    return pipe


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(NEW))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=110)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--finish", action="store_true", help="only export the last saved state")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.finish:
        finish(arguments.name, arguments.work)
    else:
        train(arguments.name, arguments.work, arguments.minutes, arguments.seed, arguments.batch_size, arguments.lr)

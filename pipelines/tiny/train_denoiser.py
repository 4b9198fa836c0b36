"""Train the denoiser and text encoders of tiny-sdxl or tiny-pixart on the captioned world.

    python -m dqtk.pipelines.tiny.train_denoiser tiny-pixart --work work/tiny --minutes 110 --threads 1
    python -m dqtk.pipelines.tiny.train_denoiser tiny-pixart --work work/more --minutes 60 --ema 0.995 --start FOLDER

v-prediction, min-SNR weighting (Hang et al. 2023, gamma 5), one caption in ten dropped for classifier-free guidance, EMA of
everything that is trained. The first part of the budget runs on half-size pictures (8x8 latents, a quarter of the cost): text is
learned there, detail afterwards, as the PixArt papers do; a run that starts from trained weights is at full size throughout.
Resumable: ``WORK/NAME.pt`` is written every 5 minutes. ``finish`` writes
the EMA weights as a bf16 diffusers folder to ``WORK/NAME`` (tiny-sdxl's first token is prepared there, see ``first_token.py``).
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor, nn

from .build import MAX_TOKENS, new_pixart, new_sdxl
from .first_token import prepare_first_token
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


def untrained(name: str, work: Path) -> DiffusionPipeline:
    """The pipeline with random weights around the trained autoencoder of ``work``."""
    return NEW[name](AutoencoderKL.from_pretrained(work / "vae"))


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


class Run:
    """Everything that a training run is resumed from: modules, their averages, the optimizer, counters."""

    def __init__(self, modules: list[nn.Module], lr: float, file: Path, max_decay: float):
        self.modules, self.file, self.max_decay = modules, file, max_decay
        self.ema = [copy.deepcopy(m).requires_grad_(False) for m in modules]
        self.optimizer = Muon(modules, lr=lr, weight_decay=0.01)
        self.step, self.spent, self.images = 0, 0.0, 0
        if file.exists():
            state = torch.load(file, weights_only=True)
            for part, saved in zip(self.modules + self.ema, state["modules"] + state["ema"], strict=True):
                part.load_state_dict(saved)
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.spent, self.images = state["step"], state["spent"], state["images"]

    def update(self, loss: Tensor, rate: float, num_images: int) -> None:
        """One optimizer step and one step of the averages."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for m in self.modules for p in m.parameters()], 1.0)
        self.optimizer.step()
        self.step, self.images = self.step + 1, self.images + num_images
        decay = min(self.max_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for averaged, module in zip(self.ema, self.modules, strict=True):
                torch._foreach_lerp_(list(averaged.parameters()), list(module.parameters()), 1 - decay)

    def save(self, spent: float) -> None:
        state = {
            "modules": [m.state_dict() for m in self.modules],
            "ema": [m.state_dict() for m in self.ema],
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "spent": spent,
            "images": self.images,
        }
        torch.save(state, self.file.with_suffix(".tmp"))
        self.file.with_suffix(".tmp").replace(self.file)


def learning_rate(lr: float, step: int, progress: float) -> float:
    """Warm-up over 200 steps, constant to 60 % of the budget, then a quarter of a cosine down to 2 %."""
    decline = 1.0 if progress < 0.6 else max(0.02, math.cos((progress - 0.6) / 0.4 * math.pi / 2))
    return lr * min(1.0, (step + 1) / 200) * decline


def train(
    name: str, work: Path, minutes: float, seed: int, batch_size: int, lr: float, max_decay: float, start: Path | None
) -> None:
    """Train until ``minutes`` of wall time are spent, over all resumed runs together; ends with ``finish``."""
    torch.manual_seed(seed)
    pipe = untrained(name, work) if start is None else DiffusionPipeline.from_pretrained(start)
    vae, half_size_until = pipe.vae, 0.0 if start is not None else HALF_SIZE_UNTIL
    predict = predict_sdxl if name == "tiny-sdxl" else predict_pixart
    run = Run(trained_modules(pipe), lr, work / f"{name}.pt", max_decay)
    data = {side: latents(vae, work, side) for side in ((32, 64) if half_size_until else (64,))}
    captions = [sample_scene(0, i).caption for i in range(NUM_PICTURES)]
    tokenizers = [t for t in (pipe.tokenizer, getattr(pipe, "tokenizer_2", None)) if t is not None]
    coded = [t(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt") for t in tokenizers]
    abar = pipe.scheduler.alphas_cumprod.float()
    generator = torch.Generator().manual_seed(seed + run.step)
    log = (work / f"{name}.log.jsonl").open("a")
    began, last_save, losses = time.time(), time.time(), []
    while (elapsed := run.spent + time.time() - began) < minutes * 60:
        progress = elapsed / (minutes * 60)
        side = 32 if progress < half_size_until else 64
        rows = torch.randint(0, NUM_PICTURES, (batch_size,), generator=generator)
        drop = torch.rand(batch_size, generator=generator) < 0.1
        ids, masks = [c.input_ids[rows] for c in coded], [c.attention_mask[rows] for c in coded]
        loss = v_loss(lambda x, t: predict(pipe, ids, masks, drop, x, t), data[side][rows].float(), abar, generator)  # noqa: B023
        run.update(loss, learning_rate(lr, run.step, progress), batch_size)
        losses.append(loss.item())
        if run.step % 100 == 0:
            row = {"step": run.step, "seconds": round(elapsed), "images": run.images, "side": side}
            print(json.dumps(row | {"loss": round(float(np.mean(losses)), 5)}), file=log, flush=True)
            losses.clear()
        if time.time() - last_save > 300:
            run.save(elapsed)
            last_save = time.time()
    run.save(minutes * 60)
    finish(name, work, start)


def v_loss(predict: Callable[[Tensor, Tensor], Tensor], x0: Tensor, abar: Tensor, generator: torch.Generator) -> Tensor:
    """min-SNR-weighted squared error of the predicted velocity; one time per equal slice of the schedule."""
    num = len(x0)
    noise = torch.randn(x0.shape, generator=generator)
    t = ((torch.arange(num) + torch.rand(num, generator=generator)) / num * len(abar)).long()
    signal, sigma = abar[t].sqrt()[:, None, None, None], (1 - abar[t]).sqrt()[:, None, None, None]
    with torch.autocast("cpu", torch.bfloat16):
        v = predict(signal * x0 + sigma * noise, t)
    snr = abar[t] / (1 - abar[t])
    weight = snr.clamp(max=5) / (snr + 1) + 0.1
    return (weight * (v.float() - (signal * noise - sigma * x0)).square().mean(dim=(1, 2, 3))).mean()


def finish(name: str, work: Path, start: Path | None) -> DiffusionPipeline:
    """Write the EMA weights of the last saved state as a bf16 pipeline to ``WORK/NAME``."""
    pipe = untrained(name, work) if start is None else DiffusionPipeline.from_pretrained(start)
    state = torch.load(work / f"{name}.pt", weights_only=True)
    for module, saved in zip(trained_modules(pipe), state["ema"], strict=True):
        module.load_state_dict(saved)
    if name == "tiny-sdxl":
        prepare_first_token(pipe, sorted({sample_scene(0, i).caption for i in range(256)}))
    write(pipe, work / name)
    return pipe


def write(pipe: DiffusionPipeline, folder: Path) -> None:
    """Save as bf16, without the folders in which the parts were trained: those mean nothing elsewhere."""
    pipe.to(torch.bfloat16).save_pretrained(folder)
    for file in folder.glob("*/config.json"):
        config = json.loads(file.read_text())
        config.pop("_name_or_path", None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(NEW))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=110)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--ema", type=float, default=0.9985, help="decay of the averages (steps: 1 / (1 - decay))")
    parser.add_argument("--start", type=Path, help="a trained pipeline to go on from")
    parser.add_argument("--finish", action="store_true", help="only export the last saved state")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.finish:
        finish(arguments.name, arguments.work, arguments.start)
    else:
        a = arguments
        train(a.name, a.work, a.minutes, a.seed, a.batch_size, a.lr, a.ema, a.start)

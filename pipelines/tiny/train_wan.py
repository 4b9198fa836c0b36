"""Train the transformer and text encoder of tiny-wan on the world in motion.

    python -m dqtk.pipelines.tiny.train_wan --work work/wan --minutes 30
    python -m dqtk.pipelines.tiny.train_wan --work work/more --minutes 30 --lr 2e-3 --start FOLDER

Flow matching (velocity = noise - latents) at noise levels shifted like the scheduler's, one caption in ten dropped for guidance,
EMA of everything that is trained. The budget begins with half-size clips (5x8x8 latents, a seventh of the tokens), where text and
motion are learned; then come the first five latent frames of whole clips, then all nine. A run that starts from trained weights has
whole clips throughout.
Needs ``WORK/vae`` from ``train_wan_vae``. Resumable: ``WORK/tiny-wan.pt`` is written every 2 minutes; ``--finish`` writes the EMA
weights of the last saved state as a bf16 diffusers folder to ``WORK/tiny-wan``, which a whole run does at its end.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, DiffusionPipeline
from torch import Tensor

from .build import MAX_TOKENS
from .build_wan import FLOW_SHIFT, new_wan
from .motion import sample_clip
from .train_denoiser import Run, learning_rate, trained_modules, write
from .train_vae import to_float
from .train_wan_vae import clips, half_size

NAME = "tiny-wan"
NUM_CLIPS = 3000
PHASES = (("half", 0.25, 2), ("begun", 0.55, 1), ("whole", 1.0, 1))  # clips, until which share of the time budget, batches of


@torch.no_grad()
def latents(vae: AutoencoderKLWan, work: Path) -> dict[str, Tensor]:
    """Normalized latents of the training clips, bf16 [NUM_CLIPS, 8, F, H, W], cached in ``work``.

    "half": 5x8x8, "whole": 9x16x16, "begun": 5x16x16, the first of "whole", which the causal encoder made of nine frames.
    """
    file = work / "latents.pt"
    if not file.exists():
        mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        rows: dict[str, list[Tensor]] = {"whole": [], "half": []}
        for start in range(0, NUM_CLIPS, 20):
            whole = to_float(clips(20, 0, start))
            for kind, x in {"whole": whole, "half": half_size(whole)}.items():
                with torch.autocast("cpu", torch.bfloat16):
                    z = vae.encode(x).latent_dist.mean.float()
                rows[kind].append(((z - mean) / std).bfloat16())
        torch.save({kind: torch.cat(parts) for kind, parts in rows.items()}, file)
    stored = torch.load(file, weights_only=True)
    return stored | {"begun": stored["whole"][:, :, :5]}


def text_states(pipe: Any, ids: Tensor, mask: Tensor, drop: Tensor) -> Tensor:
    """What the pipeline's ``encode_prompt`` gives [B, T, 128]: zeros for padding; dropped captions are the empty prompt."""
    empty = torch.zeros_like(ids)
    empty[:, 0] = pipe.tokenizer.eos_token_id
    ids = torch.where(drop[:, None], empty, ids)
    mask = torch.where(drop[:, None], (empty != 0).to(mask.dtype), mask)
    return pipe.text_encoder(ids, attention_mask=mask).last_hidden_state * mask[..., None]


def predict(pipe: Any, code: tuple[Tensor, Tensor, Tensor], x: Tensor, t: Tensor) -> Tensor:
    """The velocity of latents [B, 8, F, H, W] at times [B] of 0 to 1000; ``code``: the arguments of ``text_states``."""
    return pipe.transformer(hidden_states=x, timestep=t, encoder_hidden_states=text_states(pipe, *code), return_dict=False)[0]


def flow_loss(predict: Callable[[Tensor, Tensor], Tensor], x0: Tensor, generator: torch.Generator) -> Tensor:
    """Squared error of the predicted velocity; one noise level per equal slice of the shifted schedule."""
    num = len(x0)
    noise = torch.randn(x0.shape, generator=generator)
    even = (torch.arange(num) + torch.rand(num, generator=generator)) / num
    sigma = FLOW_SHIFT * even / (1 + (FLOW_SHIFT - 1) * even)
    mixed = torch.lerp(x0, noise, sigma.view(-1, 1, 1, 1, 1))
    with torch.autocast("cpu", torch.bfloat16), _attention_in_float32():
        velocity = predict(mixed, sigma * 1000)
    return F.mse_loss(velocity.float(), noise - x0)


@contextmanager
def _attention_in_float32() -> Iterator[None]:
    """torch's attention learns slower in bf16 than in float32: both ways 0.29 and 0.17 s for 16 x 4 x 576 x 32 on one AMX core."""
    attend = F.scaled_dot_product_attention

    def in_float32(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return attend(query.float(), key.float(), value.float(), *args, **kwargs)

    F.scaled_dot_product_attention = in_float32
    try:
        yield
    finally:
        F.scaled_dot_product_attention = attend


def untrained(work: Path) -> DiffusionPipeline:
    """The pipeline with random weights around the trained autoencoder of ``work``."""
    return new_wan(AutoencoderKLWan.from_pretrained(work / "vae"))


def train(work: Path, minutes: float, seed: int, batch_size: int, lr: float, max_decay: float, start: Path | None) -> None:
    """Train until the main thread has computed for ``minutes``, over all resumed runs together; ends with ``finish``."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    pipe: Any = untrained(work) if start is None else DiffusionPipeline.from_pretrained(start)
    phases = PHASES if start is None else PHASES[-1:]
    run = Run(trained_modules(pipe), lr, work / f"{NAME}.pt", max_decay)
    data = latents(pipe.vae, work)
    captions = [sample_clip(0, i).caption for i in range(NUM_CLIPS)]
    coded = pipe.tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, return_tensors="pt")
    generator = torch.Generator().manual_seed(seed + run.step)
    log = (work / f"{NAME}.log.jsonl").open("a")
    began, saved, losses = time.thread_time(), run.spent, []
    while (elapsed := run.spent + time.thread_time() - began) < minutes * 60:
        progress = elapsed / (minutes * 60)
        kind, num = next((kind, batch_size * times) for kind, until, times in phases if progress < until)
        rows = torch.randint(0, NUM_CLIPS, (num,), generator=generator)
        drop = torch.rand(num, generator=generator) < 0.1
        code = (coded.input_ids[rows], coded.attention_mask[rows], drop)
        loss = flow_loss(lambda x, t: predict(pipe, code, x, t), data[kind][rows].float(), generator)  # noqa: B023
        run.update(loss, learning_rate(lr, run.step, progress), num)
        losses.append(loss.item())
        if run.step % 50 == 0:
            row = {"step": run.step, "seconds": round(elapsed), "clips": run.images, "kind": kind}
            print(json.dumps(row | {"loss": round(float(np.mean(losses)), 5)}), file=log, flush=True)
            losses.clear()
        if elapsed - saved > 120:
            run.save(elapsed)
            saved = elapsed
    run.save(minutes * 60)
    finish(work, start)


def finish(work: Path, start: Path | None) -> None:
    """Write the EMA weights of the last saved state as a bf16 pipeline to ``WORK/tiny-wan``."""
    pipe = untrained(work) if start is None else DiffusionPipeline.from_pretrained(start)
    state = torch.load(work / f"{NAME}.pt", weights_only=True)
    for module, saved in zip(trained_modules(pipe), state["ema"], strict=True):
        module.load_state_dict(saved)
    write(pipe, work / NAME)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=16, help="clips a step; twice as many while they are half-size")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--ema", type=float, default=0.995, help="decay of the averages (steps: 1 / (1 - decay))")
    parser.add_argument("--start", type=Path, help="a trained pipeline to go on from")
    parser.add_argument("--finish", action="store_true", help="only export the last saved state")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if a.finish:
        finish(a.work, a.start)
    else:
        train(a.work, a.minutes, a.seed, a.batch_size, a.lr, a.ema, a.start)

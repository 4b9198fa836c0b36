"""Train tiny-clip, an ``open_clip`` model of the captioned world: the embedded feature extractor.

    python -m dqtk.pipelines.tiny.train_clip --work work/clip --minutes 25 --threads 1

A ViT over 64 patches of 8x8 pixels and a causal text transformer, CLIP's symmetric contrastive loss (Radford et al. 2021). Half of
each batch is the other half with one attribute changed (another colour, size, place, relation, count, shape or background), picture
and caption: among random captions hardly any differs in one word only, and nothing would teach the score to notice that.

Resumable: ``WORK/tiny-clip.pt`` is written every 5 minutes. ``finish`` writes an open_clip folder (``open_clip_config.json``,
safetensors in bf16, tokenizer) to ``WORK/tiny-clip``, which ``open_clip.create_model_and_transforms("local-dir:FOLDER")`` loads.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from .build import MAX_TOKENS, clip_tokenizer
from .muon import Muon
from .scenes import (
    BACKGROUNDS,
    COLOURS,
    DIGITS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZE,
    SIZES,
    Scene,
    is_held_out,
    parse_caption,
    render,
    sample_scene,
)
from .train_denoiser import learning_rate

NUM_PAIRS = 20_000
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI CLIP's
_VALUES = {
    "colour": tuple(COLOURS),
    "other_colour": tuple(COLOURS),
    "size": tuple(SIZES),
    "position": tuple(POSITIONS),
    "background": BACKGROUNDS,
    "count": (2, 3),
    "relation": tuple(RELATIONS),
}


def config() -> dict:
    """``open_clip_config.json``: architecture and preprocessing."""
    tokenizer = clip_tokenizer("!")
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {"image_size": SIZE, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
            "text_cfg": {
                "context_length": MAX_TOKENS,
                "vocab_size": len(tokenizer),
                "width": 128,
                "heads": 4,
                "layers": 3,
                "hf_tokenizer_name": "tiny-clip",
            },
        },
        "preprocess_cfg": {"mean": list(_MEAN), "std": list(_STD), "interpolation": "bicubic", "resize_mode": "shortest"},
    }


def changed(scene: Scene, rng: np.random.Generator, split: str) -> Scene:
    """The scene with one attribute changed; never a held-out one in training."""
    names = list(asdict(scene))
    while True:
        name = names[int(rng.integers(len(names)))]
        values = _VALUES.get(name, DIGITS if getattr(scene, name) in DIGITS else SHAPES)
        other = replace(scene, **{name: values[int(rng.integers(len(values)))]})
        same_colours = getattr(other, "colour", None) == getattr(other, "other_colour", 0)
        if other != scene and not same_colours and (split == "heldout" or not is_held_out(other)):
            return other


def pairs(work: Path, num: int, seed: int, split: str) -> tuple[np.ndarray, list[str]]:
    """``num`` scenes and their changed twins: uint8 pictures [2 num, 64, 64, 3] and captions, scene and twin in turn; cached."""
    file = work / f"pairs-{split}-{num}-{seed}.npz"
    if not file.exists():
        pictures, captions = [], []
        for i in range(num):
            scene = sample_scene(seed, i, split)
            for twin in (scene, changed(scene, np.random.default_rng([seed, i, 2]), split)):
                pictures.append(render(twin, seed, i))
                captions.append(twin.caption)
        np.savez(file, pictures=np.stack(pictures), captions=np.array(captions))
    with np.load(file, allow_pickle=False) as stored:
        return stored["pictures"], [str(caption) for caption in stored["captions"]]


def normalized(pictures: Tensor) -> Tensor:
    """uint8 [B, 64, 64, 3] -> float [B, 3, 64, 64] as the model's transform gives it."""
    x = pictures.permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(_MEAN).view(3, 1, 1)) / torch.tensor(_STD).view(3, 1, 1)


def disturbed(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures as a generator may paint them: with noise of up to 6 % on half of them, blurred a little on a quarter."""
    x = pictures.float()
    strength = 15 * torch.rand(len(x), 1, 1, 1, generator=generator) * (torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5)
    x = x + strength * torch.randn(x.shape, generator=generator)
    soft = F.avg_pool2d(x.permute(0, 3, 1, 2), 3, stride=1, padding=1, count_include_pad=False).permute(0, 2, 3, 1)
    return torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.25, soft, x).clamp(0, 255)


def train(work: Path, minutes: float, seed: int, batch_size: int, lr: float) -> None:
    """Train until ``minutes`` of wall time are spent, over all resumed runs together; ends with ``finish``."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = open_clip.CLIP(**config()["model_cfg"])
    optimizer, step, spent, file = Muon([model], lr=lr, weight_decay=0.05), 0, 0.0, work / "tiny-clip.pt"
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent"]
    pictures, captions = pairs(work, NUM_PAIRS, 0, "train")
    pixels = torch.from_numpy(pictures)
    tokens = tokenized(captions)
    generator = torch.Generator().manual_seed(seed + step)
    log = (work / "tiny-clip.log.jsonl").open("a")
    began, saved, losses = time.time(), time.time(), []
    while (elapsed := spent + time.time() - began) < minutes * 60:
        first = 2 * torch.randperm(NUM_PAIRS, generator=generator)[: batch_size // 2]
        rows = torch.cat([first, first + 1])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(lr, step, elapsed / (minutes * 60))
        loss = contrastive(model, normalized(disturbed(pixels[rows], generator)), tokens[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, float(np.log(100)))
        step += 1
        losses.append(loss.item())
        if step % 100 == 0:
            print(
                json.dumps({"step": step, "seconds": round(elapsed), "loss": round(float(np.mean(losses)), 4)}),
                file=log,
                flush=True,
            )
            losses.clear()
        if time.time() - saved > 300:
            _save(file, model, optimizer, step, elapsed)
            saved = time.time()
    _save(file, model, optimizer, step, minutes * 60)
    print(json.dumps({"step": step, **evaluate(model, work)}), file=log, flush=True)
    finish(work)


def contrastive(model: open_clip.CLIP, x: Tensor, tokens: Tensor) -> Tensor:
    """CLIP's loss: cross-entropy of the similarities in both directions."""
    with torch.autocast("cpu", torch.bfloat16):
        images, texts = model.encode_image(x), model.encode_text(tokens)
    logits = model.logit_scale.exp() * F.normalize(images.float(), dim=-1) @ F.normalize(texts.float(), dim=-1).T
    targets = torch.arange(len(x))
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def tokenized(captions: list[str]) -> Tensor:
    tokenizer = clip_tokenizer("!")
    return tokenizer(captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt").input_ids


@torch.no_grad()
def evaluate(model: open_clip.CLIP, work: Path, num: int = 256) -> dict[str, float]:
    """On held-out scenes: how often a picture prefers its caption to its twin's, and to all others' (retrieval)."""
    model.eval()
    pictures, captions = pairs(work, num, 1, "heldout")
    assert all(parse_caption(caption) for caption in captions)
    images = F.normalize(model.encode_image(normalized(torch.from_numpy(pictures))), dim=-1)
    texts = F.normalize(model.encode_text(tokenized(captions)), dim=-1)
    similarity = images @ texts.T
    own, twins = similarity.diagonal(), similarity[torch.arange(2 * num), torch.arange(2 * num) ^ 1]
    return {
        "twin_accuracy": float((own > twins).float().mean()),
        "retrieval": float((similarity.argmax(1) == torch.arange(2 * num)).float().mean()),
    }


def _save(file: Path, model: open_clip.CLIP, optimizer: Muon, step: int, spent: float) -> None:
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "spent": spent}
    torch.save(state, file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def finish(work: Path) -> Path:
    """Write the last saved state as an open_clip folder, ``WORK/tiny-clip``."""
    folder = work / "tiny-clip"
    folder.mkdir(exist_ok=True)
    state = torch.load(work / "tiny-clip.pt", weights_only=True)["model"]
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config(), indent=2) + "\n")
    clip_tokenizer("!").save_pretrained(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.work, arguments.minutes, arguments.seed, arguments.batch_size, arguments.lr)

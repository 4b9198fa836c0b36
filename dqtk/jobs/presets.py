"""Evaluation protocols of quantization papers by name: what a job file may leave out when it says ``preset: svdquant``.

A preset fills fields that the job file does not have (metrics, extractors, call, seeds per prompt); the models, the prompts and the
programs of workers are the user's. Where a job says otherwise than its preset, or has fewer prompts, the results say so: numbers of
another protocol are worth having, but not beside the paper's. So do the points that the paper and its code leave open, since two
honest readings of them differ by more than methods do.

From the papers, and from their code as of 2026; nothing here was confirmed by reproducing a number.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dqtk.spec import did_you_mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """One protocol. ``num_prompts``: None where unknown; ``prompts``: which, in words; ``workers``: scores that need a program.

    ``known``: what the paper or its code says beyond the fields; ``open``: what they do not, and what is taken here instead.
    """

    title: str
    models: str
    num_prompts: int | None
    prompts: str
    metrics: tuple[str, ...]
    extractors: tuple[str, ...] = ()
    call: Mapping[str, Any] = field(default_factory=dict)
    seeds_per_prompt: int = 1
    workers: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    open: tuple[str, ...] = ()


_B32, _L14 = "clip:openai/clip-vit-base-patch32", "clip:openai/clip-vit-large-patch14"
_DOVER = "DOVER's two halves as EvalCrafter normalizes them (VQA-A, VQA-T); fragments are drawn at random: seed them"

PRESETS = {
    "mixdq": Preset(
        title="MixDQ (Zhao et al. 2024, arXiv 2405.17873)",
        models="SDXL-Turbo, one step; LCM-LoRA SDXL",
        num_prompts=40504,
        prompts="COCO 2014 validation, one caption per image",
        metrics=("frechet", "clip_score"),
        extractors=("inception2015", _L14),
        call={"num_inference_steps": 1, "guidance_scale": 0.0, "height": 512, "width": 512},
        workers=("image_reward",),
        known=(
            "FID against the COCO photographs (references), at 512 pixels",
            "the search inside uses SQNR, and SSIM of window 511",
        ),
        open=(
            "the evaluation scripts were never released: FID's resize (clean-fid's is taken), CLIP's network (ViT-L/14 is taken)",
            "one global seed (42), so the authors' pictures depend on the batch size",
        ),
    ),
    "viditq": Preset(
        title="ViDiT-Q (Zhao et al. 2024, arXiv 2406.02540), its Open-Sora table",
        models="Open-Sora (STDiT)",
        num_prompts=10,
        prompts="Open-Sora's ten sample prompts",
        metrics=("clipsim", "clip_temp", "flow_score"),
        extractors=(f"legacy:{_B32}", "raft"),
        call={"num_inference_steps": 100, "guidance_scale": 4.0},
        workers=("dover_aesthetic", "dover_technical"),
        known=(
            "EvalCrafter's code: CLIP is fed with 0-255, unnormalized (legacy), so CLIPSIM is about 0.18 and CLIP-Temp about 0.998",
            "the flow score is printed as its distance from the original's (flow_score@change)",
            _DOVER,
            "other tables: eight VBench dimensions (251 prompts, 5 clips each); Latte on UCF-101, 101 clips, 20 steps: FVD",
        ),
        open=("which I3D FVD and FVD-FP16 are of; with 101 clips either is rank-deficient", "ten prompts: intervals are wide"),
    ),
    "paro": Preset(
        title="PAROAttention (Zhao et al. 2025, arXiv 2506.16054), its video table",
        models="CogVideoX-5B 720p 6 s, Wan2.1-14B 720p 10 s; Flux.1-dev for pictures",
        num_prompts=None,
        prompts="some of VBench's",
        metrics=("psnr", "ssim", "clipsim", "flow_score", "frechet"),
        extractors=(f"legacy:{_B32}", "raft", "i3d:torchscript"),
        call={"num_inference_steps": 30},
        workers=("dover_aesthetic", "dover_technical"),
        known=(
            "paired scores and FVD are against the 16-bit model's own clips of the same seeds",
            _DOVER,
            "pictures: the first 1,024 COCO captions at 1024 pixels: CLIP score, ImageReward, PSNR, SSIM, FID to the 16-bit model",
        ),
        open=(
            "how many of VBench's prompts and which, and which I3D (StyleGAN-V's is taken)",
            "whether clips were scored before or after a video codec, which moves PSNR by decibels; here before",
        ),
    ),
    "vqdm": Preset(
        title="VQDM (Egiazarian et al. 2024, arXiv 2409.00492)",
        models="SDXL",
        num_prompts=5000,
        prompts="COCO captions",
        metrics=("frechet", "clip_score", "pickscore_cosine"),
        extractors=("inception2015-pytorch", "clip:laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "pickscore"),
        call={"num_inference_steps": 50, "guidance_scale": 5.0},
        known=(
            "DDIM; CLIP is printed as the plain cosine (here 100 times it), PickScore without its scale",
            "FID is against published statistics of COCO validation pictures at 512, after LANCZOS to 256 and a centre crop",
            "the paper's evidence is people: side by side on PartiPrompts",
        ),
        open=(
            "the LANCZOS step is not part of inception2015-pytorch: resize pictures beforehand and use dqtk evaluate",
            "the authors seed once per process, so their pictures depend on the number of GPUs",
        ),
    ),
    "vq4dit": Preset(
        title="VQ4DiT (Deng et al. 2024, arXiv 2408.17131)",
        models="DiT-XL/2 at 256 and 512",
        num_prompts=10000,
        prompts="ImageNet classes, by number",
        metrics=("frechet", "sfid", "inception_score", "precision"),
        extractors=("inception2015-legacy",),
        call={"num_inference_steps": 50, "guidance_scale": 1.5},
        known=("OpenAI's evaluator and its ImageNet statistics; here references must be pictures",),
        open=(
            "guidance: 1.5 in the paper as it is remembered, 4.0 by default in its code",
            "no evaluation script is in the code; 10,000 samples give a higher FID than the usual 50,000",
        ),
    ),
    "svdquant": Preset(
        title="SVDQuant (Li et al. 2024, arXiv 2411.05007)",
        models="FLUX.1, PixArt-Sigma, SDXL, SDXL-Turbo, SANA",
        num_prompts=5000,
        prompts="MJHQ-30K, and sDCI: 5,000 each, names shuffled by Python's random.Random(0)",
        metrics=("psnr", "ssim", "lpips", "frechet", "clip_score"),
        extractors=("inception2015", _L14),
        workers=("image_reward",),
        known=(
            "clean-fid against the data set's own pictures (references); LPIPS (AlexNet), PSNR, SSIM against the 16-bit model",
            "steps and guidance are each model's own; 1024 pixels, SDXL-Turbo 512; a seed per picture from its name",
            "CLIP-IQA (torchmetrics' default) is printed too, and is not here",
        ),
        open=(
            "the seeds are a hash of file names: other names, other pictures",
            "PSNR may be of the pooled error: both are reported",
        ),
    ),
}


def preset_named(name: str) -> Preset:
    """Raises ``ValueError`` with a suggestion for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"job: preset must be one of {', '.join(PRESETS)}, got {name!r}.{did_you_mean(name, PRESETS)}")
    return PRESETS[name]


def filled(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a job file, with those that its preset has and it lacks. ``call`` is filled argument by argument."""
    if not isinstance(data.get("preset"), str):
        return dict(data)
    preset = preset_named(data["preset"])
    known = {"metrics": list(preset.metrics), "extractors": list(preset.extractors), "seeds_per_prompt": preset.seeds_per_prompt}
    own = data.get("call", {})
    return {**known, **data, "call": {**preset.call, **own} if isinstance(own, dict) else own}


def deviations(job: Mapping[str, Any], num_prompts: int) -> list[str]:
    """In what a job (as JSON) departs from its preset, and what the preset itself leaves open; a line each."""
    if not job.get("preset"):
        return []
    name, preset = job["preset"], preset_named(job["preset"])
    said = []
    if preset.num_prompts is not None and num_prompts != preset.num_prompts:
        said.append(f"{num_prompts} prompts, the protocol has {preset.num_prompts} ({preset.prompts})")
    for word in ("metrics", "extractors"):
        lacking = [part for part in getattr(preset, word) if part not in job.get(word, ())]
        if lacking:
            said.append(f"without {word} {', '.join(lacking)}")
    said += [f"without the worker {worker}" for worker in preset.workers if worker not in (job.get("workers") or {})]
    for key, value in preset.call.items():
        if job["call"].get(key) != value:
            said.append(f"{key} is {job['call'].get(key)!r}, the protocol's {value!r}")
    if job["seeds_per_prompt"] != preset.seeds_per_prompt:
        said.append(f"{job['seeds_per_prompt']} seeds per prompt, the protocol has {preset.seeds_per_prompt}")
    return [f"preset {name}: {line}" for line in said] + [f"preset {name}, not known: {line}" for line in preset.open]


def as_text() -> str:
    """All presets for a terminal."""
    lines = []
    for name, preset in PRESETS.items():
        lines.append(f"{name}: {preset.title}")
        call = ", ".join(f"{key}={value}" for key, value in preset.call.items()) or "each model's own"
        facts = {
            "models": preset.models,
            "prompts": f"{preset.num_prompts or 'number unknown'}, {preset.prompts}",
            "call": call,
            "metrics": ", ".join(preset.metrics),
            "extractors": ", ".join(preset.extractors),
            "workers": ", ".join(preset.workers),
        }
        lines += [f"  {key:<11}{value}" for key, value in facts.items() if value]
        lines += [f"  {'known':<11}{line}" for line in preset.known] + [f"  {'not known':<11}{line}" for line in preset.open]
    return "\n".join(lines)

"""Recipes of layers. They speak of roles only, so they fit any denoiser and any text encoder.

Kept at 16 bits: what is small, runs once, or is known to break first: entrance and exit layers, the noise-level embedding, the text
projection. Modulation layers are a quarter of a Flux, so they are not kept: they get 8-bit weights with 16-bit inputs, which costs
half their bytes; their input is one row per image. Recipes of our own that learn from prompts give them 4-bit weights by GPTQ:
their inputs are nearly a finite set, one row per noise level, on which GPTQ makes the outputs right (notebooks/LOG.md).

Recipes of our own that learn from prompts also keep a text token exact that is the same for every prompt: it is huge in SDXL,
and changes of basis and rounding of weights do harm there (notebooks/LOG.md).
"""

from collections.abc import Mapping
from dataclasses import replace

from dqtk.plan import Recipe, Rule
from dqtk.spec import (
    GPTQ,
    MSE,
    AbsMax,
    AdaRound,
    BeamSearch,
    BestFloat,
    ConstantToken,
    Dynamic,
    E4M3Group,
    E8M0Group,
    Float,
    Hadamard,
    Int,
    LayerSpec,
    LowRank,
    PerChannel,
    PerGroup,
    PerLevel,
    PerTensor,
    PerToken,
    ShortcutSplit,
    SiteSpec,
    Smooth,
    TensorSpec,
    Trellis,
    TwoLevel,
    VectorCodebook,
)

KEPT_ROLES = {
    "patch_embedding": "kept: first layer on the latents",
    "output_projection": "kept: last layer",
    "time_embedding": "kept: noise-level embedding, runs on one row",
    "text_projection": "kept: entrance of the text features",
}

W8 = TensorSpec(format=Int(bits=8), granularity=PerChannel())
_A8 = TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic())
_A8_STATIC = TensorSpec(format=Int(bits=8, symmetric=False), granularity=PerTensor(), range=AbsMax())
_W4 = TensorSpec(format=Int(bits=4, symmetric=False), granularity=PerGroup(size=64), range=MSE())
W4_INTEGER = TensorSpec(format=Int(bits=4), granularity=TwoLevel(size=64), range=AbsMax())
_WFP8 = TensorSpec(format=Float(), granularity=PerChannel())
_AFP8 = TensorSpec(format=Float(), granularity=PerToken(), range=Dynamic())
_AFP8_STATIC = TensorSpec(format=Float(), granularity=PerTensor(), range=AbsMax())
_E2M1 = Float(exponent=2, mantissa=1)
# Errors of float grids repeat with every factor of two: a range above the absmax is worth trying too.
_FLOAT_RANGE = MSE(steps=28, least=0.6, most=2.0)
_WFP4 = TensorSpec(format=_E2M1, granularity=PerGroup(size=64), range=_FLOAT_RANGE)
_W4_GROUP = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=64), range=MSE())
_A4_GROUP = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=64), range=Dynamic())


_TEXT_ROLES = ("cross_attn.k", "cross_attn.v")
_MODULATION = Rule(roles=("modulation",), spec=LayerSpec(weight=W8), why="modulation: 8-bit weight, 16-bit input")
_LEARNED_MODULATION = Rule(
    roles=("modulation",),
    spec=LayerSpec(weight=_W4, solver=GPTQ()),
    why="modulation: 4-bit weight that learned its few inputs, 16-bit input",
)


def _uniform(name: str, spec: SiteSpec, modulation: Rule = _MODULATION) -> Recipe:
    keep = tuple(Rule(roles=(role,), spec=None, why=why) for role, why in KEPT_ROLES.items())
    return Recipe(name=name, rules=(*keep, modulation, Rule(spec=spec, why=f"{name}: default")))


def _text_token_apart(recipe: Recipe) -> Recipe:
    """A recipe of one spec whose text keys and values look for a constant token first."""
    *before, default = recipe.rules
    assert isinstance(default.spec, LayerSpec)
    spec = replace(default.spec, transforms=(ConstantToken(), *default.spec.transforms))
    text = Rule(
        roles=_TEXT_ROLES,
        spec=spec,
        why=f"{recipe.name}: a token that is the same for every prompt is not rounded, where there is one",
    )
    return replace(recipe, rules=(*before, text, default))


def learned(name: str, spec: LayerSpec) -> Recipe:
    return _text_token_apart(_uniform(name, spec, _LEARNED_MODULATION))


def w8a16() -> Recipe:
    """INT8 weights per output channel, 16-bit inputs."""
    return _uniform("w8a16", LayerSpec(weight=W8))


def w8a8() -> Recipe:
    """INT8 weights per output channel, INT8 inputs per token, found at every call."""
    return _uniform("w8a8", LayerSpec(weight=W8, input=_A8))


def w8a8_static() -> Recipe:
    """INT8 weights per output channel, INT8 inputs with one calibrated range per tensor: the field's baseline."""
    return _uniform("w8a8-static", LayerSpec(weight=W8, input=_A8_STATIC))


def w8a8_levels() -> Recipe:
    """``w8a8-static`` with a range per interval of the noise level where ranges drift: the same kernel, some numbers more."""
    return _uniform("w8a8-levels", LayerSpec(weight=W8, input=replace(_A8_STATIC, granularity=PerLevel())))


def w4a16() -> Recipe:
    """INT4 weights with a zero point in groups of 64, 16-bit inputs."""
    return _uniform("w4a16", LayerSpec(weight=_W4))


def w4a8_rtn() -> Recipe:
    """INT4 weights in groups of 64 with integer group scales, INT8 inputs per token: one int8 matmul per layer; no prompts."""
    return _uniform("w4a8-rtn", LayerSpec(weight=W4_INTEGER, input=_A8))


def w4a8() -> Recipe:
    """``w4a8-rtn`` with smoothing searched and codes chosen by GPTQ and coordinate descent, on prompts: same kernel.

    Of the compositions measured at these bytes the best where inputs have outliers (docs/methods/comparison.md).
    """
    return learned("w4a8", integers(W4_INTEGER))


def integers(weight: TensorSpec) -> LayerSpec:
    return LayerSpec(weight=weight, input=_A8, solver=GPTQ(), transforms=(Smooth(),))


def fp8() -> Recipe:
    """FP8 E4M3 weights per output channel, FP8 inputs per token."""
    return _uniform("fp8", LayerSpec(weight=_WFP8, input=_AFP8))


def fp8_static() -> Recipe:
    """FP8 E4M3 weights per output channel, FP8 inputs with one calibrated range per tensor."""
    return _uniform("fp8-static", LayerSpec(weight=_WFP8, input=_AFP8_STATIC))


def fp4() -> Recipe:
    """FP4 E2M1 weights in groups of 64 with learned rounding, FP8 inputs per token (as FP4DiT, arXiv 2503.15465)."""
    return learned("fp4", LayerSpec(weight=_WFP4, input=_AFP8, solver=AdaRound()))


def nvfp4() -> Recipe:
    """NVFP4 weights, every group's scale searched, and NVFP4 inputs."""
    weight = TensorSpec(format=_E2M1, granularity=E4M3Group(), range=MSE())
    return _uniform("nvfp4", LayerSpec(weight=weight, input=TensorSpec(format=_E2M1, granularity=E4M3Group(), range=Dynamic())))


def mxfp4() -> Recipe:
    """MXFP4 weights, every group's exponent the best of three, and MXFP4 inputs (OCP Microscaling 1.0)."""
    weight = TensorSpec(format=_E2M1, granularity=E8M0Group(), range=MSE())
    return _uniform("mxfp4", LayerSpec(weight=weight, input=TensorSpec(format=_E2M1, granularity=E8M0Group(), range=Dynamic())))


def w4a4_svd() -> Recipe:
    """INT4 weights and inputs in groups of 64, smoothed, with a 16-bit branch of rank 32 (SVDQuant, arXiv 2411.05007) and GPTQ."""
    spec = LayerSpec(weight=_W4_GROUP, input=_A4_GROUP, solver=GPTQ(), transforms=(Smooth(),), low_rank=LowRank(rank=32))
    return learned("w4a4-svd", spec)


def w4a4_rot() -> Recipe:
    """INT4 weights and inputs in groups of 64, rotated by Hadamard matrices, GPTQ."""
    return learned("w4a4-rot", LayerSpec(weight=_W4_GROUP, input=_A4_GROUP, solver=GPTQ(), transforms=(Hadamard(),)))


def _viditq(name: str, spec: LayerSpec, also_kept: Mapping[str, str]) -> Recipe:
    """ViDiT-Q's (arXiv 2406.02540): modulation and more roles stay at 16 bits."""
    kept = {**KEPT_ROLES, "modulation": "kept: as in the paper", **also_kept}
    rules = tuple(Rule(roles=(role,), spec=None, why=why) for role, why in kept.items())
    return Recipe(name=name, rules=(*rules, Rule(spec=spec, why=f"{name}: default")))


def _balanced(alpha: float) -> LayerSpec:
    """W4 per channel, A8 per token, scaled, then rotated. alpha: on the input; the paper's is on the weight, 1 less ours."""
    weight = TensorSpec(format=Int(bits=4, symmetric=False), granularity=PerChannel())
    return LayerSpec(weight=weight, input=_A8, transforms=(Smooth(alpha=alpha), Hadamard()))


def viditq_w4a8() -> Recipe:
    """ViDiT-Q's channel balancing (arXiv 2406.02540), the paper's settings for PixArt-Sigma: scale with alpha 0.01, then rotate."""
    return _viditq("viditq-w4a8", _balanced(0.01), {})


def viditq_w4a8_video() -> Recipe:
    """The same with the paper's settings for Open-Sora 1.2: scale with alpha 0.4335; cross-attention stays at 16 bits.

    The authors' plan has these 4 bits in 4 of 28 blocks and 8 in all others; here all have 4, and ``dqtk allocate`` mixes.
    """
    kept = {f"cross_attn.{part}": "kept: cross-attention, as in the paper" for part in ("q", "k", "v", "out")}
    return _viditq("viditq-w4a8-video", _balanced(0.4335), kept)


def viditq_w8a8() -> Recipe:
    """ViDiT-Q's W8A8 (arXiv 2406.02540): INT8 weights per channel, INT8 inputs per token; text keys and values stay at 16 bits.

    The authors' settings for PixArt-Sigma, but weights without a zero point, as integer kernels take them.
    """
    kept = {role: f"kept: {what} of the text, as in the paper" for role, what in zip(_TEXT_ROLES, ("keys", "values"), strict=True)}
    return _viditq("viditq-w8a8", LayerSpec(weight=W8, input=_A8), kept)


def _mixdq(name: str, weight: TensorSpec) -> Recipe:
    """MixDQ's static quantization (arXiv 2405.17873) of one width: everything but the inputs of the first and last layer."""
    edges = Rule(
        roles=("patch_embedding", "output_projection"),
        spec=LayerSpec(weight=W8),
        why="8-bit weight, 16-bit input: first and last layer, as in the paper",
    )
    rest = Rule(
        spec=LayerSpec(weight=weight, input=_A8_STATIC, transforms=(ShortcutSplit(),)),
        why=f"{name}: a concatenated input has scales per part",
    )
    return _text_token_apart(Recipe(name=name, rules=(edges, rest)))


def mixdq_w8a8() -> Recipe:
    """INT8 weights per channel, INT8 inputs per tensor, calibrated; constant text token and concatenated inputs apart (MixDQ)."""
    return _mixdq("mixdq-w8a8", W8)


def mixdq_w4a8() -> Recipe:
    """``mixdq-w8a8`` with INT4 weights per channel, rounded to nearest. The paper's W4A8 mixes 2, 4, 8: ``dqtk allocate``."""
    return _mixdq("mixdq-w4a8", TensorSpec(format=Int(bits=4), granularity=PerChannel()))


def llm_fp4() -> Recipe:
    """LLM-FP4 (arXiv 2310.16836): FP4 weights and static FP4 inputs, splits and ranges searched, input exponents shifted."""
    search = MSE(steps=56, least=0.1, most=1.2)
    weight = TensorSpec(format=BestFloat(bits=4), granularity=PerChannel(), range=search)
    given = TensorSpec(format=BestFloat(bits=4), granularity=PerTensor(), range=search)
    return _uniform("llm-fp4", LayerSpec(weight=weight, input=given, transforms=(Smooth(alpha=1.0, power_of_two=True),)))


def _vqdm(bits: int) -> Recipe:
    weight = TensorSpec(format=VectorCodebook(books=bits), granularity=PerChannel())
    return learned(f"vqdm-{bits}bit", LayerSpec(weight=weight, solver=BeamSearch()))


def vqdm_2bit() -> Recipe:
    """Sums of 2 words of 256 for every 8 weights, learned on prompts (VQDM, arXiv 2409.00492); 16-bit inputs."""
    return _vqdm(2)


def vqdm_3bit() -> Recipe:
    """``vqdm-2bit`` with sums of 3 words: 3 bits per weight."""
    return _vqdm(3)


def vqdm_4bit() -> Recipe:
    """``vqdm-2bit`` with sums of 4 words: 4 bits per weight."""
    return _vqdm(4)


def _vq4dit(bits: int, words: int, length: int) -> Recipe:
    weight = TensorSpec(format=VectorCodebook(words=words, length=length), granularity=PerTensor())
    return _uniform(f"vq4dit-{bits}bit", LayerSpec(weight=weight))


def vq4dit_2bit() -> Recipe:
    """One book of 256 words of 4 weights per layer, k-means, no prompts: VQ4DiT's format (arXiv 2408.17131) and start."""
    return _vq4dit(2, words=256, length=4)


def vq4dit_3bit() -> Recipe:
    """``vq4dit-2bit`` with 64 words of 2 weights: 3 bits per weight."""
    return _vq4dit(3, words=64, length=2)


def _trellis(bits: int) -> Recipe:
    weight = TensorSpec(format=Trellis(bits=bits), granularity=PerChannel())
    return learned(f"trellis-{bits}bit", LayerSpec(weight=weight, solver=GPTQ(), transforms=(Hadamard(),)))


def trellis_2bit() -> Recipe:
    """Bit-shift trellis codes of 2 bits without codebooks, on rotated weights, by a GPTQ-style sweep; 16-bit inputs."""
    return _trellis(2)


def trellis_3bit() -> Recipe:
    """``trellis-2bit`` with 3 bits per weight."""
    return _trellis(3)


def trellis_4bit() -> Recipe:
    """``trellis-2bit`` with 4 bits per weight."""
    return _trellis(4)


def of_width(bits: int, inputs: int = 8) -> Recipe:
    """``bits``-bit weights that multiply INT8 inputs as integers: in groups of 64 up to 7 bits, per channel at 8; no prompts.

    What allocation chooses among. 4 and 8 are ``w4a8-rtn`` and ``w8a8``. Groups cost an eighth of a bit, and make every bit
    count: 5 bits per channel are no better than 4 in groups where some taps of a convolution are much larger than others.
    ``inputs``: their bits, 2 to 8 per token, or 16: as they are. Raises ``ValueError`` for a width outside 2 to 8.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"recipe: weight bits must be from 2 to 8, got {bits}. Integer kernels take nothing else.")
    if inputs != 16 and not 2 <= inputs <= 8:
        raise ValueError(f"recipe: input bits must be from 2 to 8, or 16, got {inputs}. Integer kernels take nothing else.")
    granularity = TwoLevel(size=64) if bits <= 7 else PerChannel()
    weight = TensorSpec(format=Int(bits=bits), granularity=granularity, range=AbsMax())
    given = None if inputs == 16 else TensorSpec(format=Int(bits=inputs), granularity=PerToken(), range=Dynamic())
    return _uniform(f"w{bits}a{inputs}", LayerSpec(weight=weight, input=given))


RECIPES = {
    "w8a16": w8a16,
    "w8a8": w8a8,
    "w8a8-static": w8a8_static,
    "w8a8-levels": w8a8_levels,
    "w4a16": w4a16,
    "w4a8-rtn": w4a8_rtn,
    "w4a8": w4a8,
    "fp8": fp8,
    "fp8-static": fp8_static,
    "fp4": fp4,
    "nvfp4": nvfp4,
    "mxfp4": mxfp4,
    "w4a4-svd": w4a4_svd,
    "w4a4-rot": w4a4_rot,
    "viditq-w4a8": viditq_w4a8,
    "viditq-w4a8-video": viditq_w4a8_video,
    "viditq-w8a8": viditq_w8a8,
    "mixdq-w8a8": mixdq_w8a8,
    "mixdq-w4a8": mixdq_w4a8,
    "llm-fp4": llm_fp4,
    "vqdm-2bit": vqdm_2bit,
    "vqdm-3bit": vqdm_3bit,
    "vqdm-4bit": vqdm_4bit,
    "vq4dit-2bit": vq4dit_2bit,
    "vq4dit-3bit": vq4dit_3bit,
    "trellis-2bit": trellis_2bit,
    "trellis-3bit": trellis_3bit,
    "trellis-4bit": trellis_4bit,
}

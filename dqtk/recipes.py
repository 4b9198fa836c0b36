"""The generic recipes by name. They speak of roles only, so they fit any denoiser and any text encoder.

Kept at 16 bits: what is small, runs once, or is known to break first: entrance and exit layers, the noise-level embedding, the text
projection. Modulation layers are a quarter of a Flux, so they are not kept: they get 8-bit weights with 16-bit inputs, which costs
half their bytes; their input is one row per image.
"""

from .plan import Recipe, Rule
from .spec import (
    MSE,
    AbsMax,
    Dynamic,
    Float,
    Int,
    LayerSpec,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    TensorSpec,
    TwoLevel,
    did_you_mean,
)

KEPT_ROLES = {
    "patch_embedding": "kept: first layer on the latents",
    "output_projection": "kept: last layer",
    "time_embedding": "kept: noise-level embedding, runs on one row",
    "text_projection": "kept: entrance of the text features",
}

_W8 = TensorSpec(format=Int(bits=8), granularity=PerChannel())
_A8 = TensorSpec(format=Int(bits=8), granularity=PerToken(), range=Dynamic())
_A8_STATIC = TensorSpec(format=Int(bits=8, symmetric=False), granularity=PerTensor(), range=AbsMax())
_W4 = TensorSpec(format=Int(bits=4, symmetric=False), granularity=PerGroup(size=64), range=MSE())
_W4_INTEGER = TensorSpec(format=Int(bits=4), granularity=TwoLevel(size=64), range=AbsMax())
_WFP8 = TensorSpec(format=Float(), granularity=PerChannel())
_AFP8 = TensorSpec(format=Float(), granularity=PerToken(), range=Dynamic())


def _uniform(name: str, spec: LayerSpec) -> Recipe:
    keep = tuple(Rule(roles=(role,), spec=None, why=why) for role, why in KEPT_ROLES.items())
    modulation = Rule(roles=("modulation",), spec=LayerSpec(weight=_W8), why="modulation: 8-bit weight, 16-bit input")
    return Recipe(name=name, rules=(*keep, modulation, Rule(spec=spec, why=f"{name}: default")))


def w8a16() -> Recipe:
    """INT8 weights per output channel, 16-bit inputs."""
    return _uniform("w8a16", LayerSpec(weight=_W8))


def w8a8() -> Recipe:
    """INT8 weights per output channel, INT8 inputs per token, found at every call."""
    return _uniform("w8a8", LayerSpec(weight=_W8, input=_A8))


def w8a8_static() -> Recipe:
    """INT8 weights per output channel, INT8 inputs with one calibrated range per tensor: the field's baseline."""
    return _uniform("w8a8-static", LayerSpec(weight=_W8, input=_A8_STATIC))


def w4a16() -> Recipe:
    """INT4 weights with a zero point in groups of 64, 16-bit inputs."""
    return _uniform("w4a16", LayerSpec(weight=_W4))


def w4a8() -> Recipe:
    """INT4 weights in groups of 64 with integer group scales, INT8 inputs per token: one int8 matmul per layer."""
    return _uniform("w4a8", LayerSpec(weight=_W4_INTEGER, input=_A8))


def fp8() -> Recipe:
    """FP8 E4M3 weights per output channel, FP8 inputs per token."""
    return _uniform("fp8", LayerSpec(weight=_WFP8, input=_AFP8))


RECIPES = {"w8a16": w8a16, "w8a8": w8a8, "w8a8-static": w8a8_static, "w4a16": w4a16, "w4a8": w4a8, "fp8": fp8}


def recipe_named(name: str) -> Recipe:
    """A generic recipe. Raises ``ValueError`` with a suggestion for an unknown name."""
    if name not in RECIPES:
        raise ValueError(f"recipe: name must be one of {', '.join(RECIPES)}, got {name!r}.{did_you_mean(name, RECIPES)}")
    return RECIPES[name]()

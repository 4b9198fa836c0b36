"""dqtk: post-training quantization for diffusers pipelines.

    plan = dqtk.plan(pipe, "w4a8-rtn")
    dqtk.quantize(pipe, plan)
    pipe.save_pretrained("pixart-w4a8")

Importing dqtk registers its checkpoint format with diffusers and transformers (at once, or when they are imported), so that
``DiffusionPipeline.from_pretrained`` loads quantized folders.
"""

from typing import Any

from .allocate import allocate
from .calibrate import Stats, calibrate
from .hosts import register_with_hosts
from .plan import Plan, Recipe, Rule
from .quantize import load, plan, quantize, save
from .sites import Adapter, Site, find_sites
from .spec import LayerSpec

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "LayerSpec",
    "Plan",
    "Recipe",
    "Rule",
    "Site",
    "Stats",
    "allocate",
    "calibrate",
    "compare",
    "find_sites",
    "load",
    "plan",
    "quantize",
    "save",
]


def __getattr__(name: str) -> Any:
    if name == "compare":  # only when asked for: it brings image metrics
        from .report.compare import compare

        return compare
    raise AttributeError(f"module 'dqtk' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


register_with_hosts()

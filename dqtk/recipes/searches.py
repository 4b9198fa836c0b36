"""Searches: recipes with a budget, which measure layers before they choose among recipes (``dqtk allocate --search``)."""

from dataclasses import replace

from dqtk.plan import Recipe, Rule
from dqtk.spec import Int, LayerSpec, PerChannel, TensorSpec, did_you_mean, frozen

from .layers import (
    W4_INTEGER,
    W8,
    integers,
    learned,
    trellis_2bit,
    trellis_3bit,
    trellis_4bit,
    viditq_w4a8,
    w4a8,
    w8a8,
    w8a16,
)

CONTENT_ROLES = (*(f"cross_attn.{part}" for part in ("q", "k", "v", "out")), "ff.up", "ff.down")
"""MixDQ's content group: what a picture shows. Everything else is its quality group."""


@frozen
class Search:
    """A recipe with a budget: what every layer may become, and how many bits per weight all may take (``dqtk allocate --search``).

    bits: stored, on average over all planned layers, kept ones at 16. scores: (group, name of its score). sweep: of the ratio
    between the groups' budgets. switch: exchanges of levels to try.
    """

    name: str
    candidates: tuple[Recipe, ...]
    bits: float
    scores: tuple[tuple[str, str], ...] = ()
    sweep: bool = False
    switch: int | None = None


def auto() -> Search:
    """Ours: smoothed and learned weights of 2, 3 and 4 bits, or INT8, with INT8 inputs, at 4.5 bits; 100 exchanges."""
    narrow = [learned(f"w{bits}a8", integers(replace(W4_INTEGER, format=Int(bits=bits)))) for bits in (2, 3)]
    return Search(name="auto", candidates=(*narrow, w4a8(), w8a8()), bits=4.5, switch=100)


def mixdq_w3_66a16() -> Search:
    """MixDQ (arXiv 2405.17873): weights per channel of 2, 4 or 8 bits in its content group, 4 or 8 elsewhere, at 3.66 bits.

    Content by SSIM of pictures, the ratio of the groups' budgets swept, as in the paper; nothing is kept. Quality layers minimise a
    sum of noise powers, where the paper maximises one of decibels.
    """
    found = []
    for bits in (2, 4, 8):
        wide, narrow = (LayerSpec(weight=TensorSpec(format=Int(bits=b), granularity=PerChannel())) for b in (max(bits, 4), bits))
        rules = (Rule(roles=CONTENT_ROLES, spec=narrow, why="mixdq: content"), Rule(spec=wide, why="mixdq: quality"))
        found.append(Recipe(name=f"mixdq-w{bits}a16", rules=rules))
    return Search(name="mixdq-w3.66a16", candidates=tuple(found), bits=3.66, scores=(("content", "ssim"),), sweep=True)


def viditq_mp_w4a8() -> Search:
    """ViDiT-Q's mixed W4A8 (arXiv 2406.02540): ``viditq-w4a8`` with 4 or 8 bits per layer, at 6 bits.

    The authors' plan for PixArt-Sigma was made by hand (8 bits for the feed-forwards and both end blocks); 6 bits are its average.
    """
    four = viditq_w4a8()
    rules = tuple(replace(r, spec=replace(r.spec, weight=W8)) if isinstance(r.spec, LayerSpec) else r for r in four.rules)
    return Search(name="viditq-mp-w4a8", candidates=(four, Recipe(name="viditq-w8a8", rules=rules)), bits=6.0)


def vq_auto() -> Search:
    """Trellis codes of 2, 3 or 4 bits per layer, or INT8 weights, at 3 bits; 16-bit inputs; 100 exchanges."""
    return Search(name="vq-auto", candidates=(trellis_2bit(), trellis_3bit(), trellis_4bit(), w8a16()), bits=3.0, switch=100)


SEARCHES = {"auto": auto, "mixdq-w3.66a16": mixdq_w3_66a16, "viditq-mp-w4a8": viditq_mp_w4a8, "vq-auto": vq_auto}


def search_named(name: str) -> Search:
    """A recipe with a budget. Raises ``ValueError`` with a suggestion for an unknown name."""
    if name not in SEARCHES:
        raise ValueError(f"allocate: search must be one of {', '.join(SEARCHES)}, got {name!r}.{did_you_mean(name, SEARCHES)}")
    return SEARCHES[name]()

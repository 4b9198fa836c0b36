"""What quantization changed in VBench's scores: video by video, with intervals over prompts.

Two models' means of 100 to 450 videos differ by sampling alone; videos of the same prompt and index, made from the same seed,
differ by what was done to the model. They are paired by their base names, as result files have them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..bootstrap import Interval, paired_bootstrap
from ..flips import change_interval
from .results import Scored
from .suite import prompt_of_name

_VERDICTS = ("dynamic_degree",)  # dimensions whose videos are 0 or 1 each


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """Of one dimension: the mean of candidate minus reference over ``num_videos`` pairs, with its interval; how many have no
    partner."""

    interval: Interval
    num_videos: int
    num_unmatched: int


def paired_changes(candidate: Mapping[str, Scored], reference: Mapping[str, Scored], *, seed: int = 0) -> dict[str, Change]:
    """Of every dimension that both have, in the candidate's order.

    Raises ``ValueError`` where they share no dimension, and for a dimension of which no video is in both.
    """
    shared = [name for name in candidate if name in reference]
    if not shared:
        raise ValueError(
            f"vbench: both results must share a dimension, got {', '.join(candidate)} and {', '.join(reference)}. "
            "Measure one in both."
        )
    return {name: _change(name, candidate[name].videos, reference[name].videos, seed) for name in shared}


def _change(name: str, mine: Mapping[str, float | None], theirs: Mapping[str, float | None], seed: int) -> Change:
    pairs = {}
    for base, value in mine.items():
        other = theirs.get(base)
        if value is not None and other is not None:
            pairs[base] = (other, value)
    if not pairs:
        raise ValueError(
            f"vbench: {name} must have videos of one name in both results, got {len(mine)} and {len(theirs)} without a pair. "
            "Videos are called PROMPT-INDEX.mp4."
        )
    prompts = [prompt_of_name(base)[0] for base in pairs]
    places = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    whose = [places[prompt] for prompt in prompts]
    before, after = (list(column) for column in zip(*pairs.values(), strict=True))
    if name in _VERDICTS:
        interval = change_interval(before, after, whose, seed=seed)
    else:
        interval = paired_bootstrap([b - a for a, b in zip(before, after, strict=True)], whose, seed=seed)
    return Change(interval=interval, num_videos=len(pairs), num_unmatched=len(set(mine) | set(theirs)) - len(pairs))

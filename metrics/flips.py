"""Flips: images whose yes-or-no outcome changes between the original model and the candidate, in either direction.

"Accuracy is not all you need" (Dutta et al. 2024, arXiv 2407.09141): a compressed model can keep its mean score while many
single outcomes change, and it is those that a user notices. The outcome may be any Boolean per prompt and seed: the right object
is there, the text is legible, the image finds its own prompt. The net change alone hides churn, so both directions are kept.

The p-value is the exact McNemar test: if the candidate is as good as the original, each discordant pair is a fair coin.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.stats import binomtest
from torch import Tensor

from .bootstrap import Interval, paired_bootstrap


@dataclass(frozen=True, kw_only=True, slots=True)
class Flips:
    """Numbers of images by outcome of reference and candidate, and McNemar's exact two-sided ``p_value``."""

    right_to_wrong: int
    wrong_to_right: int
    both_right: int
    both_wrong: int
    p_value: float

    @property
    def gross(self) -> int:
        """How many outcomes changed."""
        return self.right_to_wrong + self.wrong_to_right

    @property
    def net(self) -> int:
        """How many more became right than became wrong."""
        return self.wrong_to_right - self.right_to_wrong


def never_seen_bound(num: int, confidence: float = 0.95) -> float:
    """How often something may happen that was not seen in ``num`` independent tries: the upper end of Clopper & Pearson's 1934
    two-sided interval for 0 of ``num``. Raises ``ValueError`` for less than one try.
    """
    if num < 1:
        raise ValueError(f"never_seen_bound: num must be at least 1, got {num}. Compare at least one prompt.")
    return 1 - ((1 - confidence) / 2) ** (1 / num)


def flips(reference: Tensor | Sequence[bool], candidate: Tensor | Sequence[bool]) -> Flips:
    """The flips between two bool [N], entry i of both from one prompt and seed; ``p_value`` is 1 where nothing flipped.

    The test takes entries for independent: several seeds of one prompt make it too sure. Raises ``ValueError`` for another
    dtype, shapes that differ, and no entries.
    """
    before, after = torch.as_tensor(reference), torch.as_tensor(candidate)
    for name, x in (("reference", before), ("candidate", after)):
        if x.ndim != 1 or len(x) == 0:
            raise ValueError(f"flips: {name} must be [N] and not empty, got {list(x.shape)}. Pass one outcome per image.")
        if x.dtype != torch.bool:
            raise ValueError(f"flips: {name} must be bool, got {x.dtype}. Compare scores with a threshold first.")
    if len(before) != len(after):
        raise ValueError(
            f"flips: both must be of one length, got {len(before)} and {len(after)}. Compare the same prompts and seeds."
        )
    after = after.to(before.device)
    right_to_wrong, wrong_to_right = int((before & ~after).sum()), int((~before & after).sum())
    discordant = right_to_wrong + wrong_to_right
    return Flips(
        right_to_wrong=right_to_wrong,
        wrong_to_right=wrong_to_right,
        both_right=int((before & after).sum()),
        both_wrong=int((~before & ~after).sum()),
        p_value=float(binomtest(right_to_wrong, discordant).pvalue) if discordant else 1.0,
    )


def change_interval(before: Sequence[float], after: Sequence[float], prompts: Sequence[int], *, seed: int = 0) -> Interval:
    """The mean change of yes-or-no outcomes (0 or 1), with its interval: ``paired_bootstrap``'s, or where all changed alike
    (mostly: none flipped), and resampling would claim certainty, what so many *prompts* can rule out (``never_seen_bound``).

    Raises ``ValueError`` for outcomes that are neither 0 nor 1, and as ``paired_bootstrap``.
    """
    odd = [value for value in (*before, *after) if value not in (0, 1)]
    if odd:
        raise ValueError(f"change_interval: outcomes must be 0 or 1, got {odd[0]}. Bootstrap the changes of other numbers.")
    change = [float(b - a) for a, b in zip(before, after, strict=True)]
    found = paired_bootstrap(change, prompts, seed=seed)
    if found.low is None or len(set(change)) > 1:
        return found
    bound = never_seen_bound(len(set(prompts)))
    low, high = max(-1.0, found.estimate - bound), min(1.0, found.estimate + bound)
    return Interval(estimate=found.estimate, low=low, high=high)

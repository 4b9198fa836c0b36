"""Inception score (Salimans et al. 2016, "Improved Techniques for Training GANs"): exp of the mean KL(p(y|x) || p(y)).

From logits, so that the classifier is the caller's to name; the published one is the 2015 TensorFlow Inception with 1008
outputs, read without its last bias. It knows no reference: it rewards confident and varied classes, not closeness to the
original model, and for text-to-image models is a relic. Offered for comparison with papers.

The value depends on the number of images per split (it is bounded by it), so splits and N belong beside it. Images are shuffled
by ``seed`` before they are split, since generated sets come sorted by class or prompt.
"""

import math

import torch
from torch import Tensor

from .moments import check_features
from .score import ClassScore


def inception_score(logits: Tensor, *, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Mean and population standard deviation of the score over ``splits`` parts of ``logits`` [N, C]; from 1 to C.

    Parts differ by at most one image. Raises ``ValueError`` for logits outside the contract of features, and fewer images than
    splits.
    """
    check_features("inception_score", logits)
    if not 1 <= splits <= len(logits):
        raise ValueError(
            f"inception_score: splits must be from 1 to the number of images ({len(logits)}), got {splits}. The default is 10."
        )
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed)).to(logits.device)
    scores = []
    for part in logits.detach()[order].tensor_split(splits):
        log_p = part.double().log_softmax(dim=1)
        log_marginal = log_p.logsumexp(dim=0) - math.log(len(part))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(dim=1).mean().exp())
    values = torch.stack(scores)
    return float(values.mean()), float(values.std(correction=0))


SCORES = (ClassScore(name="inception_score", label="Inception Score", higher_is_better=True, function=inception_score, least=10),)

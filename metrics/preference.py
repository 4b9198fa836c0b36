"""What people prefer, as far as a CLIP trained on their choices knows: PickScore and HPSv2, each in the two scales of papers.

    pickscore          logit_scale cos, about 20 to 23: its authors' code      Kirstain et al. 2023, arXiv 2305.01569
    pickscore_cosine   cos, about 0.2                                          VQDM's tables
    hpsv2              cos, about 0.2 to 0.3: what the hpsv2 package returns   Wu et al. 2023, arXiv 2306.09341
    hpsv2_100          100 cos, about 20 to 30                                 most tables

Both are plain CLIP checkpoints (extractors ``pickscore``, ``hpsv2``, ``hpsv2.1``), and these scores are taken with them alone. The
versions 2.0 and 2.1 of HPSv2 are other weights, and the package's functions differ in their default: the extractor says which it
was. Differences between pictures of one prompt are what they were trained for; the mean over prompts is mostly about the prompts,
so read the paired change. ImageReward, HPSv3 and others that are no CLIP come through a worker (docs/preference.md).
"""

from torch import Tensor

from .clip_score import clip_cosine
from .score import TextScore


def hundredfold(images: Tensor, texts: Tensor) -> Tensor:
    """100 times the cosine per picture, float64 [N]; inputs as ``clip_cosine``. Not clamped: negative means disliked."""
    return 100 * clip_cosine(images, texts)


SCORES = (
    TextScore(name="pickscore", label="PickScore", higher_is_better=True, function=clip_cosine, scaled=True, only=("pickscore",)),
    TextScore(
        name="pickscore_cosine",
        label="PickScore, cosine",
        higher_is_better=True,
        digits=4,
        function=clip_cosine,
        only=("pickscore",),
    ),
    TextScore(name="hpsv2", label="HPSv2", higher_is_better=True, digits=4, function=clip_cosine, only=("hpsv2*",)),
    TextScore(name="hpsv2_100", label="HPSv2, times 100", higher_is_better=True, function=hundredfold, only=("hpsv2*",)),
)

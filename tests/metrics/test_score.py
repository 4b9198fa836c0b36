"""Which numbers may stand beside published ones."""

from types import SimpleNamespace

import pytest
from dqtk.metrics.clip_score import SCORES as TEXTS
from dqtk.metrics.frechet import SCORES as FRECHETS
from dqtk.metrics.mmd import SCORES as MMDS
from dqtk.metrics.score import comparable

SCORES = {score.name: score for score in (*TEXTS, *FRECHETS, *MMDS)}


@pytest.mark.parametrize(
    ("score", "extractor", "preprocess", "known", "wanted"),
    [
        ("frechet", "inception2015", "clean", True, True),
        ("frechet", "inception2015", "clean", False, False),  # somebody's own weights
        ("frechet", "dinov2[facebook/dinov2-large]", "squash", True, True),
        ("sfid", "inception2015", "legacy", True, True),
        ("sfid", "inception2015", "clean", True, False),
        ("cmmd", "inception2015", "clean", True, False),
        ("cmmd", "open_clip[ViT-B-32]", "p", True, False),
        ("cmmd", "open_clip[ViT-L-14-336]", "p", True, True),
        ("cmmd", "open_clip[apple/CLIP-ViT-L-14-336]", "p", True, True),
        ("cmmd", "clip[openai/clip-vit-large-patch14]", "p", True, False),
        ("cmmd", "clip[openai/clip-vit-large-patch14-336]", "p", True, True),
        ("kid", "inception2015", "clean", True, True),
        ("clip_score", "open_clip[ViT-B-32]", "p", True, True),
        ("retrieval", "open_clip[ViT-B-32]", "p", True, False),
    ],
)
def test_by_score_extractor_preprocess_and_reference(score, extractor, preprocess, known, wanted):
    made = SimpleNamespace(name=extractor, preprocess=preprocess, comparable=known)
    assert comparable(SCORES[score], made, to_original=False) is wanted
    assert comparable(SCORES[score], made, to_original=True) is False

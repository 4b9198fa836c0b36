"""Feature cosine: of a network's features, whatever network; what it is given is 8-bit."""

import pytest
import torch
from dqtk.metrics.feature_similarity import feature_cosine, feature_score

from dqtk.resolve import pair_score


class Means:
    """Features: the mean of each colour, and what was given."""

    name = "means"

    def encode_images(self, images):
        self.given = images.dtype
        return images.float().mean((2, 3))


def plain(*colours):
    return torch.tensor(colours)[:, :, None, None].expand(-1, -1, 8, 8)


def test_cosine_of_features():
    network = Means()
    red, green, both = plain([1.0, 0, 0]), plain([0, 1.0, 0]), plain([1.0, 1.0, 0])
    found = feature_cosine(torch.cat([red, red, red]), torch.cat([red, green, both]), extractor=network)
    assert network.given == torch.uint8
    assert found.tolist() == pytest.approx([1, 0, 0.5**0.5], abs=1e-12)
    assert feature_score(network).name == "features[means]"
    with pytest.raises(ValueError, match=r"feature_cosine: the second batch must be in \[0, 1\]"):
        feature_cosine(red, 3 * green, extractor=network)


def test_a_trained_network_sees_a_change():
    """The embedded CLIP: another object is further than another shade."""
    score = pair_score("features:tiny-clip").load()
    draw = torch.Generator().manual_seed(0)
    picture = torch.rand((1, 3, 64, 64), generator=draw) * 0.1 + 0.4
    shade, shape = picture * 1.05, picture.clone()
    shape[:, 0, 16:48, 16:48] = 1.0
    same, near, far = (float(score(other, picture)) for other in (picture, shade, shape))
    assert same == pytest.approx(1, abs=1e-6)
    assert far < near < 1


def test_names_of_scores():
    assert pair_score("ssim").name == "ssim"
    for name in ("simm", "features", "fid"):
        with pytest.raises(ValueError, match=r"score: name must be one of .*features:EXTRACTOR, got"):
            pair_score(name)

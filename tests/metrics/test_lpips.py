"""LPIPS: torchmetrics' implementation with the same (random) backbone, missing and damaged weights."""

import pytest
import torch
from dqtk.metrics.lpips import URLS, Lpips, MissingWeights, _backbone, find_backbone
from torch import nn
from torchmetrics.functional.image.lpips import _LPIPS

pytest.importorskip("torchvision", reason="torchvision is needed for the peer's backbone; pip install 'dqtk[clip]'")


@pytest.fixture(scope="module", params=["alex", "vgg"])
def pair(request, tmp_path_factory):
    """Ours and torchmetrics', sharing a random backbone saved under torchvision's names."""
    torch.manual_seed(0)
    features = _backbone(request.param)
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    state = {f"features.{name}": value for name, value in features.state_dict().items()}
    torch.save(state | {"classifier.1.weight": torch.zeros(1)}, path)
    theirs = _LPIPS(pretrained=False, net=request.param, pnet_rand=True, use_dropout=True)
    slices = dict(theirs.net.named_parameters())
    for name, value in slices.items():
        value.data.copy_(features.state_dict()[name.split(".", 1)[1]])
    ours = Lpips(request.param, path, check=False)
    for i in range(5):
        getattr(theirs, f"lin{i}").model[1].weight.data.copy_(ours.get_buffer(f"head_{i}"))
    return ours, theirs.eval()


def test_equals_torchmetrics_on_the_same_weights(pair):
    ours, theirs = pair
    torch.manual_seed(1)
    a = torch.rand(2, 3, 64, 64)
    b = (a + 0.1 * torch.randn_like(a)).clamp(0, 1)
    with torch.no_grad():
        expected = theirs(a, b, normalize=True).flatten()
    assert torch.allclose(ours(a, b), expected, rtol=1e-4)
    assert (expected > 0).all()
    assert ours(a, a).tolist() == [0.0, 0.0]


def test_more_damage_is_further(pair):
    ours, _ = pair
    torch.manual_seed(1)
    a = torch.rand(1, 3, 64, 64)
    distances = [float(ours((a + amount * torch.randn_like(a)).clamp(0, 1), a)) for amount in (0.02, 0.1, 0.4)]
    assert distances == sorted(distances)


def test_heads_are_the_published_ones(pair):
    ours, _ = pair
    assert all((ours.get_buffer(f"head_{i}") >= 0).all() for i in range(5))
    assert sum(ours.get_buffer(f"head_{i}").numel() for i in range(5)) in (1152, 1472)


def test_missing_weights_say_where_and_what(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeights, match=r"must be a file, got .*alexnet-owt-7be5be79\.pth \(not there\)\. Download https://"):
        Lpips()
    with pytest.raises(MissingWeights, match=r"got .*here\.pth"):
        Lpips("vgg", tmp_path / "here.pth")
    cached = tmp_path / "hub" / "checkpoints" / URLS["vgg"].rsplit("/", 1)[1]
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert find_backbone("vgg") == cached


def test_damaged_and_unknown(tmp_path):
    path = tmp_path / "alexnet.pth"
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"lpips: SHA-256 of .* must begin with 7be5be79, got [0-9a-f]{8}\. Download"):
        Lpips("alex", path)
    with pytest.raises(ValueError, match=r"lpips: net must be one of \['alex', 'vgg'\], got 'resnet'\."):
        Lpips("resnet", path)


def test_identity_is_of_the_net_and_both_kinds_of_weights(pair, tmp_path):
    ours, _ = pair
    net = "alex" if ours.name == "lpips[alex]" else "vgg"
    state = {f"features.{name}": value for name, value in _backbone(net).state_dict().items()}
    torch.save(state, tmp_path / "other.pth")
    other = Lpips(net, tmp_path / "other.pth", check=False)
    assert ours.identity.startswith(f"{net}, backbone ")
    assert other.identity != ours.identity
    assert other.identity.rsplit(" ", 1)[1] == ours.identity.rsplit(" ", 1)[1]  # the heads are one file

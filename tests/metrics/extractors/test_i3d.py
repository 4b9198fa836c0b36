"""I3D: the published names and sizes, TensorFlow's padding, three variants that are three extractors; what is refused."""

import math

import pytest
import torch
from dqtk.metrics.extractors.contract import identity
from dqtk.metrics.extractors.find import extractor_named
from dqtk.metrics.extractors.i3d import I3D, LEAST, VARIANTS, I3DNetwork, _cropped, _same
from dqtk.metrics.extractors.weights import MissingWeights


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A state dict of random weights whose features do not die out."""
    torch.manual_seed(0)
    network = I3DNetwork()
    path = tmp_path_factory.mktemp("i3d") / "random.pt"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def clips():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (1, LEAST + 1, 3, 30, 40), dtype=torch.uint8, generator=generator)


def test_names_and_sizes_are_those_of_the_ports():
    state = I3DNetwork().state_dict()
    assert sum(value.numel() for name, value in state.items() if "running" not in name and "num_" not in name) == 12_697_264
    assert tuple(state["Conv3d_1a_7x7.conv3d.weight"].shape) == (64, 3, 7, 7, 7)
    assert tuple(state["Mixed_4f.b1b.conv3d.weight"].shape) == (320, 160, 3, 3, 3)
    assert tuple(state["Mixed_5c.b3b.bn.running_var"].shape) == (128,)
    assert tuple(state["logits.conv3d.weight"].shape) == (400, 1024, 1, 1, 1)
    assert "logits.conv3d.bias" in state
    assert "Conv3d_2c_3x3.conv3d.bias" not in state


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 15, 16])
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 2), (3, 1), (2, 2), (1, 1)])
def test_same_padding_gives_a_place_per_step(size, kernel, stride):
    x = torch.ones(1, 1, size, size, size)
    padded = _same(x, (kernel,) * 3, (stride,) * 3)
    assert (padded.shape[2] - kernel) // stride + 1 == math.ceil(size / stride)
    front = int(padded[0, 0, :, padded.shape[3] // 2, padded.shape[4] // 2].argmax())
    assert front == (padded.shape[2] - size) // 2  # the odd one lies behind


def test_one_file_is_two_extractors_of_clips(file, clips):
    pool, logits = (I3D(variant, file) for variant in ("rgb_imagenet", "kinetics400"))
    rows, scores = pool.encode_clips(clips), logits.encode_clips(clips)
    assert (rows.shape, scores.shape) == ((1, 1024), (1, 400))
    assert (pool.dim, logits.dim) == (1024, 400)
    assert rows.std() > 0
    assert identity(pool) != identity(logits)
    assert not pool.comparable  # not the published file
    assert "short side 256, centre crop 224" in pool.preprocess


def test_frames_reach_the_network_in_order_and_on_its_scale(file, clips):
    seen = []

    class Watching(I3DNetwork):
        def forward(self, x):
            seen.append(x)
            return torch.zeros(1, 1024), torch.zeros(1, 400)

    for frames in (None, LEAST):
        found = I3D("rgb_imagenet", file, frames=frames)
        found.network = Watching()
        found.encode_clips(clips)
    assert [x.shape[2] for x in seen] == [LEAST + 1, LEAST]
    assert "first 9 frames" in found.preprocess
    torch.testing.assert_close(seen[0], (_cropped(clips[0].float(), 256) / 127.5 - 1).transpose(0, 1)[None])
    assert torch.equal(seen[0][:, :, :LEAST], seen[1])
    assert seen[0].abs().max() <= 1


@pytest.mark.parametrize(
    ("size", "short", "wanted"), [((30, 40), None, "squash"), ((30, 40), 224, "crop"), ((50, 20), 256, "crop")]
)
def test_frames_are_squashed_or_cropped_in_the_middle(size, short, wanted):
    height, width = size
    ramp = torch.linspace(0, 1, width).expand(2, 3, height, width)
    x = _cropped(ramp, short)
    assert x.shape == (2, 3, 224, 224)
    assert float(x.mean()) == pytest.approx(0.5, abs=0.01)
    kept = float(x[0, 0, 0, -1] - x[0, 0, 0, 0])
    longer = width / height if short == 224 else 256 / 224 if width < height else 1
    assert kept == pytest.approx(1 / longer if wanted == "crop" else 1, abs=0.05)


class _Scripted(torch.nn.Module):
    def forward(self, x, rescale: bool = True, resize: bool = True, return_features: bool = False):
        assert not rescale
        assert not resize
        assert return_features
        return x.mean(dim=(1, 3, 4))[:, :1] * torch.ones(1, 400)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")  # of the writing; the extractor reads published files
def test_a_torchscript_file_gets_frames_that_are_ready(tmp_path, clips):
    torch.jit.script(_Scripted()).save(str(tmp_path / "i3d_torchscript.pt"))
    found = I3D("torchscript", tmp_path / "i3d_torchscript.pt")
    rows = found.encode_clips(torch.full_like(clips, 255))
    assert rows.shape == (1, 400)
    assert float(rows[0, 0]) == pytest.approx(1)
    assert "squash 224" in found.preprocess


def test_what_is_refused(tmp_path, file, clips, monkeypatch):
    monkeypatch.setenv("DQTK_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeights, match=r"i3d\[rgb_imagenet\]: weights must be a file, got .*rgb_imagenet\.pt"):
        extractor_named("i3d:rgb_imagenet")
    with pytest.raises(ValueError, match=r"i3d: variant must be one of torchscript, kinetics400, rgb_imagenet, got 'rgb'"):
        extractor_named("i3d:rgb")
    with pytest.raises(ValueError, match=r"i3d: frames must be at least 9, got 8\."):
        I3D("kinetics400", file, frames=8)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "rgb_imagenet.pt")
    with pytest.raises(ValueError, match=r"must hold the network's .* tensors, got .* missing"):
        extractor_named("i3d:rgb_imagenet")
    (tmp_path / "i3d_torchscript.pt").write_bytes(b"no network")
    with pytest.raises(ValueError, match="must be a TorchScript network"):
        extractor_named("i3d:torchscript")
    named = extractor_named(f"i3d:kinetics400={file}")
    assert named.name == "i3d[kinetics400]"
    with pytest.raises(ValueError, match=r"i3d\[kinetics400\]: a clip must have at least 9 frames, got 8\."):
        named.encode_clips(clips[:, :8])
    assert set(VARIANTS) == {"torchscript", "kinetics400", "rgb_imagenet"}

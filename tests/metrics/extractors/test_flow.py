"""Optical flows on motion that is known, and the contract that both keep."""

import pytest
import torch
import torch.nn.functional as F
from dqtk.metrics.extractors.find import extractor_named
from dqtk.metrics.extractors.flow import FlowEstimator, checked_flow, warp
from dqtk.metrics.extractors.lucas_kanade import LucasKanade
from dqtk.metrics.extractors.raft import Raft
from dqtk.metrics.extractors.weights import MissingWeights
from dqtk.pipelines.tiny.motion import SPEEDS, parse_caption, render


@pytest.fixture(scope="module")
def texture():
    """Smooth random colours, float [1, 3, 200, 200] in [0, 1]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 50, 50, generator=generator)
    return F.interpolate(coarse, size=(200, 200), mode="bicubic", align_corners=False).clamp(0, 1)


def seen(texture, x, y):
    """What a camera sees whose pixels lie at x, y [H, W] of the texture; uint8."""
    grid = torch.stack([(2 * x + 1) / texture.shape[3] - 1, (2 * y + 1) / texture.shape[2] - 1], dim=-1)[None]
    found = F.grid_sample(texture, grid, mode="bicubic", align_corners=False)
    return (found.clamp(0, 1) * 255).round().to(torch.uint8)


def camera(height=96, width=80):
    y, x = torch.meshgrid(torch.arange(height) + 50.0, torch.arange(width) + 60.0, indexing="ij")
    return x, y


@pytest.mark.parametrize("move", [(0.3, -0.4), (1, 0), (2, 3), (-5, 4), (7, -5)])
def test_a_shift_is_found_to_a_tenth_of_a_pixel(texture, move):
    x, y = camera()
    found = LucasKanade().flow(seen(texture, x, y), seen(texture, x - move[0], y - move[1]))
    assert found.shape == (1, 2, 96, 80)
    error = (found - torch.tensor(move).view(1, 2, 1, 1)).norm(dim=1)
    inner = error[:, 16:-16, 16:-16]  # nothing comes in from outside there
    assert inner.quantile(0.9) < 0.1


def test_a_zoom_is_found_everywhere(texture):
    x, y = camera(96, 96)
    cx, cy = x.mean(), y.mean()
    found = LucasKanade().flow(seen(texture, x, y), seen(texture, cx + (x - cx) / 1.05, cy + (y - cy) / 1.05))
    wanted = 0.05 * torch.stack([x - cx, y - cy])[None]
    assert (found - wanted).norm(dim=1)[:, 12:-12, 12:-12].mean() < 0.1


@pytest.mark.parametrize("kind", ["still", "flat"])
def test_what_does_not_move_has_no_flow(texture, kind):
    frames = seen(texture, *camera(33, 47)) if kind == "still" else torch.full((1, 3, 33, 47), 90, dtype=torch.uint8)
    assert LucasKanade().flow(frames, frames.clone()).abs().max() < 1e-4


@pytest.mark.parametrize(
    "caption",
    [
        "a small red cross moving right quickly on a gradient background",
        "a small green cross moving left quickly on a plain gray background",
        "a medium cyan cross moving down slowly on a plain gray background",
    ],
)
def test_the_embedded_world_moves_at_its_speed(caption):
    clip = parse_caption(caption)
    frames = torch.from_numpy(render(clip, 1, 0)).permute(0, 3, 1, 2)
    found = LucasKanade().flow(frames[:-1], frames[1:])
    changed = (frames[1:] != frames[:-1]).any(dim=1)
    assert found.norm(dim=1)[changed].mean() == pytest.approx(SPEEDS[clip.speed], rel=0.2)
    still = F.max_pool2d(changed.float(), 31, stride=1, padding=15) == 0
    assert found.norm(dim=1)[still].mean() < 0.05 * SPEEDS[clip.speed]


def test_pairs_do_not_depend_on_their_neighbours(texture):
    x, y = camera(40, 40)
    frames = torch.cat([seen(texture, x - i, y + i) for i in range(4)])
    together = LucasKanade().flow(frames[:-1], frames[1:])
    alone = torch.cat([LucasKanade().flow(frames[i : i + 1], frames[i + 1 : i + 2]) for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-4)


def test_tiny_frames_are_taken():
    frames = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    assert checked_flow(LucasKanade(), frames, frames.flip(0)).shape == (2, 2, 5, 7)


def test_warping_undoes_the_motion(texture):
    x, y = camera()
    first, second = seen(texture, x, y), seen(texture, x - 3, y + 2)
    flow = torch.tensor([3.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 96, 80)
    back, inside = warp(second, flow)
    assert torch.equal(inside[0, 2:, :-3], torch.ones(94, 77, dtype=torch.bool))
    assert not inside[0, :1].any()
    assert (back - first)[..., 2:, :-3].abs().max() < 1e-2
    assert not (back - first)[..., :2, :].abs().max() < 1


def test_identities_and_the_contract(raft_file):
    for estimator in (LucasKanade(), Raft(raft_file, updates=1)):
        assert isinstance(estimator, FlowEstimator)
        assert not estimator.comparable
        with pytest.raises(ValueError, match=r"must be uint8, got torch\.float32"):
            estimator.flow(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))
        with pytest.raises(ValueError, match=r"must be of one shape, got \[2, 3, 16, 16\] and \[1, 3, 16, 16\]"):
            estimator.flow(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (torch.zeros(1, 4, 4, 2), r"flow must be float32 \[1, 2, 4, 4\], x then y, got torch.float32 \[1, 4, 4, 2\]"),
        (torch.zeros(1, 2, 4, 4).double(), "got torch.float64"),
        (torch.full((1, 2, 4, 4), torch.nan), "got NaN or infinity in 1 of 1 pairs"),
    ],
)
def test_estimators_that_break_the_contract_are_refused(returned, said):
    class Broken(LucasKanade):
        def flow(self, first, second):
            return returned

    frames = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match=said):
        checked_flow(Broken(), frames, frames)


# --- RAFT ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raft_file(tmp_path_factory):
    """A state dict of torchvision's raft_large with random weights."""
    from torchvision.models.optical_flow import raft_large

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("raft") / "random.pth"
    torch.save(raft_large(weights=None).state_dict(), path)
    return path


def test_raft_is_torchvisions_on_padded_frames(raft_file):
    from torchvision.models.optical_flow import raft_large

    frames = torch.randint(0, 256, (2, 3, 50, 133), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    estimator = Raft(raft_file, updates=2)
    found = checked_flow(estimator, frames[:1], frames[1:])
    network = raft_large(weights=None).eval()
    network.load_state_dict(torch.load(raft_file, weights_only=True))
    # 50 -> 128: 39 above, 39 below; 133 -> 136: one to the left, two to the right.
    a, b = (F.pad(x.float() / 127.5 - 1, (1, 2, 39, 39), mode="replicate") for x in (frames[:1], frames[1:]))
    with torch.no_grad():
        wanted = network(a, b, num_flow_updates=2)[-1][:, :, 39:89, 1:134]
    assert torch.allclose(found, wanted, atol=1e-4)
    assert estimator.name == "raft[random]"
    assert "2 updates" in estimator.preprocess


def test_raft_by_name_needs_its_weights(monkeypatch, tmp_path, raft_file):
    monkeypatch.setenv("DQTK_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeights, match=r"raft_large_C_T_V1-22a6c225\.pth"):
        extractor_named("raft")
    assert extractor_named(f"raft:{raft_file}").sha256 == Raft(raft_file).sha256
    assert extractor_named("lucas-kanade").name == "lucas-kanade"


def test_raft_refuses_other_files(tmp_path):
    other = tmp_path / "other.pth"
    torch.save({"a": torch.zeros(1)}, other)
    with pytest.raises(ValueError, match="must hold the network's"):
        Raft(other)
    other.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="must be readable weights"):
        Raft(other)
    with pytest.raises(ValueError, match="updates must be at least 1, got 0"):
        Raft(other, updates=0)

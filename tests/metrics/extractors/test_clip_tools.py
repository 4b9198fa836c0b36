"""What video scores look with: clips as the mean of frames, heads, MUSIQ, VBench's ways to resize, and their names."""

import math

import pytest
import torch
import torch.nn.functional as F
from dqtk.metrics.extractors.aesthetic import AestheticHead
from dqtk.metrics.extractors.contract import ClipEncoder, Extractor, checked_clips, identity
from dqtk.metrics.extractors.find import extractor_named
from dqtk.metrics.extractors.musiq import Musiq, _Network, multiscale
from dqtk.metrics.extractors.pooled_clip import PooledClip, middle_frames
from dqtk.metrics.extractors.resize import resize_shorter
from dqtk.metrics.extractors.weights import MissingWeights
from dqtk.metrics.score import FrameScore, as_published, serves
from dqtk.pipelines.tiny.train_aesthetic import disturbed, embeddings, examples, fitted
from safetensors.torch import save_file

from dqtk.resolve import extractor_for, scores


@pytest.fixture(scope="module")
def tiny_clip():
    return extractor_for("tiny-clip")


def clip(num, seed=0):
    return torch.randint(0, 256, (num, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# --- clips as means ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num", "taken"), [(8, list(range(8))), (16, list(range(0, 16, 2))), (17, [0, 2, 4, 6, 8, 10, 12, 15]), (5, list(range(5)))]
)
def test_the_middle_of_eight_parts(num, taken):
    assert [len(middle_frames(num)), *middle_frames(num)] == [min(8, num), *taken]


def test_a_clip_is_the_mean_of_unit_embeddings(tiny_clip):
    frames = clip(16)
    encoder = extractor_for("frames:tiny-clip")
    assert isinstance(encoder, ClipEncoder)
    wanted = F.normalize(tiny_clip.encode_images(frames[::2]), dim=1).mean(dim=0)
    assert torch.allclose(checked_clips(encoder, frames[None])[0], wanted, atol=1e-6)
    assert torch.equal(encoder.encode_texts(["a red circle"]), tiny_clip.encode_texts(["a red circle"]))
    assert not encoder.comparable
    assert identity(encoder) != identity(tiny_clip)
    with pytest.raises(ValueError, match=r"clips must be \[B, F, 3, H, W\], got \[16, 3, 64, 64\]"):
        checked_clips(encoder, frames)


def test_a_clip_encoder_must_give_a_row_per_clip(tiny_clip):
    class Broken(PooledClip):
        def encode_clips(self, clips):
            return super().encode_clips(clips).repeat(2, 1)

    with pytest.raises(ValueError, match=r"features must be float32 \[1, 128\], one row per image"):
        checked_clips(Broken(tiny_clip), clip(4)[None])


# --- heads ---------------------------------------------------------------------------------------------------------------


def test_an_aesthetic_head_is_linear_on_unit_embeddings(tiny_clip, tmp_path):
    state = {"weight": torch.randn(1, 128), "bias": torch.randn(1)}
    save_file(state, tmp_path / "head.safetensors")
    head = AestheticHead(tiny_clip, tmp_path / "head.safetensors")
    assert isinstance(head, Extractor)
    images = clip(3)
    wanted = F.normalize(tiny_clip.encode_images(images), dim=1) @ state["weight"].T + state["bias"]
    assert torch.allclose(head.encode_images(images), wanted, atol=1e-5)
    assert head.name == "aesthetic[head, open_clip[tiny-clip]]"


def test_heads_of_other_networks_are_refused(tiny_clip, tmp_path, monkeypatch):
    torch.save({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, tmp_path / "sa_0_4_vit_l_14_linear.pth")
    monkeypatch.setenv("DQTK_WEIGHTS", str(tmp_path))
    with pytest.raises(ValueError, match=r"must be \[1, 128\], the width of open_clip\[tiny-clip\], got \[1, 768\]"):
        AestheticHead(tiny_clip)
    torch.save({"layers.0.weight": torch.zeros(1, 128)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="must hold the network's 2 tensors"):
        AestheticHead(tiny_clip, "other.pth")
    with pytest.raises(MissingWeights, match="LAION-AI/aesthetic-predictor"):
        AestheticHead(tiny_clip, "none.pth")


def test_the_embedded_head_likes_clean_frames_better(tiny_clip):
    """Of captions that it was not made with; noise that nobody would miss."""
    frames, points = examples(30, seed=5, split="heldout")
    head = extractor_for("tiny-aesthetic")
    said = head.encode_images(frames)[:, 0].double()
    assert torch.corrcoef(torch.stack([said, points]))[0, 1] > 0.2
    clean = frames[::5]
    noisy = torch.stack([_noisy(frame) for frame in clean])
    assert (head.encode_images(clean) - head.encode_images(noisy)).mean() > 0.5
    rows = embeddings(frames)
    again = fitted(rows, points)
    fit = rows @ again["weight"][0].double() + again["bias"].double()
    assert (fit - points).square().mean() < (said - points).square().mean()  # it minimizes what it should


def _noisy(frame):
    import numpy as np

    array = disturbed(frame.permute(1, 2, 0).numpy(), "noise", 1.0, np.random.default_rng(0))
    return torch.from_numpy(array).permute(2, 0, 1)


# --- MUSIQ ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def musiq_file(tmp_path_factory):
    torch.manual_seed(0)
    network = _Network()
    for parameter in network.transformer_encoder.parameters():
        if parameter.ndim != 2:
            torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("musiq") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


def test_musiq_has_the_published_parameters(musiq_file):
    """Names and shapes of musiq_spaq_ckpt-358bb6af.pth, as far as they are not one block after the other."""
    shapes = {name: tuple(value.shape) for name, value in torch.load(musiq_file, weights_only=True).items()}
    assert shapes["conv_root.weight"] == (64, 3, 7, 7)
    assert shapes["block1.conv_proj.weight"] == (256, 64, 1, 1)
    assert shapes["embedding.weight"] == (384, 16384)
    assert shapes["transformer_encoder.posembed_input.position_emb"] == (1, 100, 384)
    assert shapes["transformer_encoder.scaleembed_input.scale_emb"] == (3, 384)
    assert shapes["transformer_encoder.cls"] == (1, 1, 384)
    assert shapes["transformer_encoder.transformer.encoderblock_13.attention.query.bias"] == (384,)
    assert shapes["transformer_encoder.transformer.encoderblock_0.mlp.fc1.weight"] == (1152, 384)
    assert shapes["head.weight"] == (1, 384)
    assert len(shapes) == 248


def test_scales_patches_places_and_padding():
    """A picture of 70 x 100: longer sides 224, 384 and its own 100."""
    image = torch.rand(1, 3, 70, 100) * 2 - 1
    patches, places, scales, mask = multiscale(image)
    counts = [math.ceil(round(70 * r) / 32) * math.ceil(round(100 * r) / 32) for r in (2.24, 3.84, 1)]
    assert counts == [5 * 7, 9 * 12, 3 * 4]
    assert len(patches) == 49 + 144 + 12
    assert [int(mask[a:b].sum()) for a, b in ((0, 49), (49, 193), (193, 205))] == counts
    assert scales[mask].bincount().tolist() == counts
    assert places[193:].tolist() == [10 * y + x for y in (0, 3, 6) for x in (0, 2, 5, 7)]
    # Zeros around: 96 - 70 = 26 rows, 13 above; 128 - 100 = 28 columns, 14 to the left.
    assert torch.equal(patches[193][:, 13:, 14:], image[0, :, :19, :18])
    assert (patches[193][:, :13] == 0).all()
    assert (patches[~mask] == 0).all()


def test_musiq_standardizes_masks_and_sees(musiq_file):
    judge = Musiq(musiq_file)
    images = clip(2, seed=4)
    scores = judge.encode_images(images)
    assert scores.shape == (2, 1)
    assert torch.allclose(scores[1:], judge.encode_images(images[1:]), atol=1e-4)
    assert (scores[0] - scores[1]).abs() > 1e-4
    scaled = torch.load(musiq_file, weights_only=True)
    scaled["conv_root.weight"] = 3 * scaled["conv_root.weight"] + 1  # standardization undoes both
    judge.network.load_state_dict(scaled)
    assert torch.allclose(judge.encode_images(images), scores, atol=1e-2)
    assert judge.name == "musiq[random]"
    assert not judge.comparable


def test_musiq_is_blind_to_what_pads(musiq_file):
    network = _Network().eval()
    network.load_state_dict(torch.load(musiq_file, weights_only=True))
    tokens, places = torch.randn(6, 384), torch.arange(6)
    mask = torch.tensor([True] * 4 + [False] * 2)
    with torch.no_grad():
        first = network.transformer_encoder(tokens, places, places * 0, mask)
        tokens[4:] = 9
        second = network.transformer_encoder(tokens, places, places * 0, mask)
        alone = network.transformer_encoder(tokens[:4], places[:4], places[:4] * 0, mask[:4])
    assert torch.allclose(first, second, atol=1e-5)
    assert torch.allclose(first, alone, atol=1e-5)


def test_large_pictures_are_shrunk_to_512(musiq_file, monkeypatch):
    judge = Musiq(musiq_file)
    seen = []
    monkeypatch.setattr(judge, "network", lambda x: (seen.append(tuple(x.shape)), torch.zeros(1, 1))[1])
    judge.encode_images(torch.zeros(1, 3, 480, 832, dtype=torch.uint8))
    judge.encode_images(torch.zeros(1, 3, 100, 512, dtype=torch.uint8))
    assert seen == [(1, 3, 295, 512), (1, 3, 100, 512)]


def test_musiq_wants_its_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DQTK_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(MissingWeights, match=r"musiq_spaq_ckpt-358bb6af\.pth"):
        extractor_named("musiq")


# --- resizing and names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "wanted"), [((480, 832), (224, 388)), ((832, 480), (388, 224)), ((64, 64), (224, 224))])
def test_the_shorter_side_is_224_as_torchvision_does_it(size, wanted):
    from torchvision.transforms.v2.functional import InterpolationMode, resize

    images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = resize_shorter(images, 224)
    assert tuple(found.shape[2:]) == wanted
    theirs = resize(images.float(), [224], interpolation=InterpolationMode.BILINEAR, antialias=False)
    assert torch.allclose(found, theirs, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("warp:tiny-clip", r"warp:tiny-clip must be of an optical flow, got open_clip\[tiny-clip\]"),
        ("frames:lucas-kanade", "frames:lucas-kanade must be of a model of pictures and texts, got lucas-kanade"),
        ("frames", "name must be one of inception2015"),
        ("lucas-kanada", "Did you mean 'lucas-kanade'"),
    ],
)
def test_extractors_made_of_the_wrong_ones_are_refused(text, said):
    with pytest.raises(ValueError, match=said):
        extractor_for(text)


def test_scores_see_only_what_serves_them(tiny_clip):
    known = scores()
    tools = {name: extractor_for(name) for name in ("frames:tiny-clip", "lucas-kanade", "warp:lucas-kanade", "immerkaer")}
    tools |= {"tiny-clip": tiny_clip}
    served = {
        "subject_consistency": {"tiny-clip"},
        "imaging_quality": {"immerkaer"},
        "dynamic_degree": {"lucas-kanade"},
        "motion_smoothness": {"warp:lucas-kanade"},
        "overall_consistency": {"frames:tiny-clip"},
        "frechet": {"tiny-clip", "frames:tiny-clip"},
        "clip_score": {"tiny-clip", "frames:tiny-clip"},
        "psnr": set(),
        "temporal_flickering_unfiltered": set(),
    }
    for name, wanted in served.items():
        assert {tool for tool, extractor in tools.items() if serves(known[name], extractor)} == wanted, name
    for name in ("subject_consistency", "imaging_quality", "dynamic_degree", "motion_smoothness", "overall_consistency"):
        assert not any(as_published(known[name], extractor) for extractor in tools.values()), name


def test_published_names_and_preprocessing_decide_what_is_comparable():
    class Named:
        comparable = True

        def __init__(self, name, preprocess):
            self.name, self.preprocess = name, preprocess

    known = scores()
    dino = Named("dino[facebook/dino-vitb16]", "vbench, bilinear, shortest 224, imagenet")
    assert as_published(known["subject_consistency"], dino)
    assert not as_published(known["background_consistency"], dino)
    assert not as_published(known["subject_consistency"], Named(dino.name, "pil-bicubic-float, squash 224, imagenet"))
    clip_b = Named("clip[openai/clip-vit-base-patch32]", "vbench, bicubic, shortest 224+crop, own mean and std")
    assert as_published(known["background_consistency"], clip_b)
    head = Named("aesthetic[sa_0_4_vit_l_14_linear, clip[openai/clip-vit-large-patch14]]", clip_b.preprocess)
    assert as_published(known["aesthetic_quality"], head)
    assert isinstance(known["aesthetic_quality"], FrameScore)
    assert as_published(known["dynamic_degree"], Named("raft[things]", "x"))
    assert as_published(known["imaging_quality"], Named("musiq[spaq]", "x"))

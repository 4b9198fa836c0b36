"""Clips: what of the output and of the frames is scored, and an allocation of the embedded video pipeline from end to end."""

import copy
import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import PixArtSigmaPipeline, WanPipeline
from dqtk.metrics.score import PairScore
from torch import nn

import dqtk
from dqtk.allocate.probes import CHANGES, OutputSQNR, PictureScore
from dqtk.allocate.wishes import check_scored
from dqtk.calibrate.replay import Call
from dqtk.calls import by_frames, layouts_of, makes_clips
from dqtk.checkpoint import quantized_layers
from dqtk.cli import main
from dqtk.plan import Plan
from dqtk.resolve import scores

FEW = {"num_inference_steps": 1, "num_frames": 5, "height": 32, "width": 32}


class Frames(nn.Module):
    """Latents [B, C, F, H, W], plus what is the same in all frames and what turns its sign with every frame."""

    config = SimpleNamespace(in_channels=3)

    def __init__(self):
        super().__init__()
        self.same, self.turning = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, hidden_states, timestep):
        sign = torch.tensor([1, -1, 1, -1.0]).view(4, 1, 1)
        return (hidden_states + self.same + self.turning * sign,)


def test_what_all_frames_share_is_no_noise_of_changes():
    module = Frames().requires_grad_(False)
    calls = [Call("transformer", (), {"hidden_states": torch.randn(2, 3, 4, 5, 6), "timestep": torch.ones(2)}, 0.5)]
    whole, changes = OutputSQNR({"transformer": module}, calls), OutputSQNR({"transformer": module}, calls, view=CHANGES)
    assert (whole.name, changes.name, changes.loss) == ("sqnr", "difference_sqnr", "noise")
    module.same.fill_(0.1)
    assert whole("transformer") < 25
    assert changes("transformer") > 120
    module.same.zero_()
    module.turning.fill_(0.1)
    (x,) = (call.kwargs["hidden_states"].double() for call in calls)
    expected = 10 * torch.log10(x.diff(dim=2).square().mean() / 0.04)
    assert changes("transformer") == pytest.approx(float(expected), abs=1e-3)
    assert whole("transformer") > changes("transformer")


def test_where_frames_lie():
    """Wan and others have them behind the channels, CogVideoX before, LTX outermost in one row of tokens."""
    latents = torch.arange(2 * 3 * 4 * 2 * 2.0).view(2, 3, 4, 2, 2)
    wan, cog, ltx, flux = (type(name, (nn.Module,), {})() for name in _CLASSES)
    assert torch.equal(by_frames(wan, {}, latents)[:, 1], latents[:, :, 1])
    assert torch.equal(by_frames(cog, {}, latents)[:, 1], latents[:, 1])
    packed = torch.arange(2 * 12 * 5.0).view(2, 12, 5)
    sizes = {"num_frames": 3, "height": 2, "width": 2}
    assert torch.equal(by_frames(ltx, sizes, packed)[:, 1], packed[:, 4:8])
    with pytest.raises(
        ValueError, match=r"frames: latents of LTXVideoTransformer3DModel must be .*, got \[2, 12, 5\]. Pictures have"
    ):
        by_frames(ltx, sizes | {"num_frames": 1, "height": 12, "width": 1}, packed)
    with pytest.raises(ValueError, match="frames: latents of UNet must be"):
        by_frames(flux, {"hidden_states": latents[:, :, 0]}, latents[:, :, 0])


def test_frames_of_a_class_without_an_adapter_lie_behind_its_channels_or_nobody_knows():
    latents, unknown = torch.arange(2 * 3 * 4 * 2 * 2.0).view(2, 3, 4, 2, 2), type("Unknown3DModel", (nn.Module,), {})()
    says = (
        r"frames: latents of Unknown3DModel must be \[B, C, F, H, W\] with its channels C \(none in its configuration\) .*adapter"
    )
    with pytest.raises(ValueError, match=says):
        by_frames(unknown, {}, latents)
    unknown.config = SimpleNamespace(in_channels=36, out_channels=3)  # such as of a model that is given a picture beside
    assert torch.equal(by_frames(unknown, {}, latents)[:, 1], latents[:, :, 1])
    for other in (latents.movedim(1, -1), latents.movedim(1, 2), latents[:, :, :3]):  # channels elsewhere; and as many frames
        with pytest.raises(ValueError, match=r"\(in_channels 36, out_channels 3\) and another F, got \["):
            by_frames(unknown, {}, other)


def test_kandinsky_has_its_channels_last():
    """By the model itself: its frames lie where a change of one frame of noise shows, its tokens are those that it attends over."""
    from diffusers import Kandinsky5Transformer3DModel

    sizes = {"in_visual_dim": 3, "out_visual_dim": 3, "in_text_dim": 8, "in_text_dim2": 8, "time_dim": 8, "model_dim": 16}
    blocks = {"ff_dim": 16, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (2, 2, 4), "patch_size": (1, 2, 2)}
    torch.manual_seed(0)
    model = Kandinsky5Transformer3DModel(**sizes, **blocks)
    latents = torch.randn(2, 5, 4, 6, 3)
    arguments = {"hidden_states": latents, "encoder_hidden_states": torch.randn(2, 7, 8), "timestep": torch.ones(2)}
    arguments |= {"pooled_projections": torch.randn(2, 8), "text_rope_pos": torch.arange(7)}
    arguments |= {"visual_rope_pos": [torch.arange(5), torch.arange(2), torch.arange(3)]}
    seen = []
    model.visual_transformer_blocks[0].self_attention.to_query.register_forward_hook(lambda m, a, y: seen.append(a[0].shape[1]))
    model.text_transformer_blocks[0].self_attention.to_query.register_forward_hook(lambda m, a, y: seen.append(a[0].shape[1]))
    with torch.no_grad():
        made = model(**arguments, return_dict=False)
    output = made[0] if isinstance(made, tuple) else made
    assert by_frames(model, arguments, output).shape == (2, 5, 4, 6, 3)
    assert torch.equal(by_frames(model, arguments, latents)[:, 1], latents[:, 1])
    found = layouts_of(model, arguments)
    assert set(seen) == set(found) == {30, 7}
    assert (found[30].frames, found[30].rows, found[30].columns) == (5, 2, 3)
    with pytest.raises(ValueError, match="tokens of Kandinsky5Transformer3DModel must be in rows"):
        layouts_of(model, arguments | {"sparse_params": {"to_fractal": True}})


_CLASSES = ("WanTransformer3DModel", "CogVideoXTransformer3DModel", "LTXVideoTransformer3DModel", "UNet")


class Filmer:
    """A pipeline of one number: every frame is noise of its generator, brighter by ``step`` from frame to frame."""

    def __init__(self, listed):
        self.step, self.listed = 0.0, listed

    def __call__(self, prompt, num_frames, generator, output_type):
        assert output_type == "pt"
        still = torch.stack([0.25 + 0.25 * torch.rand(3, 16, 16, generator=one) for one in generator])
        frames = torch.stack([still + self.step * index for index in range(num_frames)], dim=1)
        return SimpleNamespace(frames=list(frames) if self.listed else frames)


@pytest.mark.parametrize("listed", [True, False])
def test_scores_of_clips(listed):
    """A score of pictures is of every frame, one of clips of each clip; the original's clips are painted once for both."""
    pipe = Filmer(listed)
    how = {"seed": 3, "batch_size": 2, "call_kwargs": {"num_frames": 4}}
    changes = PictureScore(pipe, ["a"] * 3, scores()["frame_changes"], **how)
    distance = PairScore(name="mad", label="", higher_is_better=False, load=lambda: lambda a, b: (a - b).abs().mean((1, 2, 3)))
    frames = PictureScore(pipe, ["a"] * 3, distance, beside=changes, **how)
    assert frames.references is changes.references
    assert [clip.shape for clip in changes.references] == [(2, 4, 3, 16, 16), (1, 4, 3, 16, 16)]
    assert (changes.name, changes.loss) == ("frame_changes of 3 clips", "noise")
    assert (frames.name, frames.loss) == ("mad of 3 clips", "score")
    assert changes() == scores()["psnr"].cap
    pipe.step = 0.1
    assert changes() == pytest.approx(20, abs=1e-4)
    assert frames() == pytest.approx(-0.15)


def test_frames_of_clips_are_scored_some_at_a_time():
    sizes = []

    def mad(a, b):
        sizes.append(len(a))
        return (a - b).abs().mean((1, 2, 3))

    pipe = Filmer(listed=False)
    score = PairScore(name="mad", label="", higher_is_better=False, load=lambda: mad)
    probe = PictureScore(pipe, ["a"] * 2, score, seed=3, batch_size=2, call_kwargs={"num_frames": 20})
    pipe.step = 0.01
    assert probe() == pytest.approx(-0.01 * 9.5, abs=1e-6)
    assert sizes == [32, 8]


def test_a_score_of_clips_needs_clips():
    pipe = Filmer(listed=False)

    class Painter:
        def __call__(self, prompt, generator, output_type):
            return SimpleNamespace(images=pipe(prompt, 1, generator, output_type).frames[:, 0])

    with pytest.raises(ValueError, match="frame_changes must be asked of a video pipeline, got one of pictures"):
        PictureScore(Painter(), ["a"], scores()["frame_changes"], seed=0, batch_size=1, call_kwargs=None)


def test_who_makes_clips():
    assert makes_clips(Filmer(listed=False))
    assert makes_clips(Filmer)
    assert makes_clips(WanPipeline)
    assert not makes_clips(PixArtSigmaPipeline)
    assert not makes_clips(SimpleNamespace(components={}))


# --- the embedded pipeline -------------------------------------------------------------------------------------------


@pytest.fixture
def wan():
    pipe = dqtk.load("tiny-wan")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_groups_of_clips_are_measured_each_in_its_own_way(wan, tmp_path):
    """Text by what a network sees, time by changes of the output, space by the output: three programs, and a plan that paints."""
    captions = ["a small red circle moving left slowly on a striped background"]
    keep = ["blocks.[1-9].*", "*attn*.to_[kv]", "*to_out*"]
    how = {"keep": keep, "call_kwargs": FEW, "batch_size": 1, "progress": False, "folder": tmp_path / "work"}
    measures = {"text": "features:tiny-clip", "temporal": "difference_sqnr"}
    ratios = {"text": 1.0, "temporal": 1.0}
    made = dqtk.allocate(wan, captions, ["w4a8-rtn", "w8a8"], "15.6bits", scores=measures, ratio=ratios, **how)
    assert set(made.groups) == {"text", "temporal", "spatial"}
    assert made.expected is None  # of three measures
    rows = [json.loads(line) for line in (tmp_path / "work" / "done-0.jsonl").read_text().splitlines()]
    measured = {row["layer"].split()[0].partition(":")[2]: set(row) - {"layer"} for row in rows}
    (seen,) = measured["blocks.0.attn2.to_q"]
    assert seen.startswith("features[")
    assert seen.endswith("of 1 clips")
    assert measured["blocks.0.attn1.to_q"] == {"difference_sqnr"}
    assert measured["blocks.0.ffn.net.2"] == {"sqnr"}
    dqtk.quantize(wan, made.plan, made.stats, progress=False)
    assert {f"transformer:{path}" for path in quantized_layers(wan.transformer)} == {
        site for site, spec in made.picked.items() if spec is not None
    }
    with pytest.raises(ValueError, match="a group of clips must be one of text, temporal, spatial, got 'content'"):
        dqtk.allocate(wan, captions, ["w8a8"], "9bits", scores={"content": "ssim"}, ratio=1.0, **how)


def test_a_search_for_pictures_is_refused_before_weights_are_read(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.import_module("dqtk.allocate.command"), "load_pipeline", lambda *a: pytest.fail("read weights"))
    words = ["allocate", "tiny-wan", "--output", str(tmp_path / "plan.json")]
    assert main([*words, "--search", "mixdq-w3.66a16"]) == 2
    said = capsys.readouterr().err
    assert "allocate: the pipeline must make pictures, got one of clips: search mixdq-w3.66a16 is for pictures. Take one of" in said
    assert "auto, viditq-mp-w4a8, vq-auto, or give scores of text, temporal, spatial." in said
    scored = ["--widths", "4", "8", "--budget", "6bits", "--score", "content=ssim", "--ratio", "1"]
    assert main([*words, *scored]) == 2
    assert "a group of clips must be one of text, temporal, spatial, got 'content'" in capsys.readouterr().err


def test_a_search_goes_with_what_it_is_for():
    own = {"content": "ssim"}
    check_scored(own, "mixdq-w3.66a16", clips=False)
    check_scored({"text": "ssim"}, "mixdq-w3.66a16", clips=True)  # scores given beside it
    for clips in (False, True):
        check_scored({}, "auto", clips=clips)
        check_scored({}, None, clips=clips)
    with pytest.raises(ValueError, match="a group of clips must be one of text, temporal, spatial, got 'content'"):
        check_scored(own, None, clips=True)


@torch.no_grad()
def test_recipes_of_the_paper_on_a_video_transformer(wan):
    """Each quantizes and paints; 8 bits are nearer than 4; cross-attention stays where the recipe for clips says so."""
    prompt = "a small red circle moving left slowly on a striped background"
    stats = dqtk.calibrate(wan, [prompt], dqtk.plan(wan, "viditq-w4a8"), call_kwargs=FEW, keep_calls=True, progress=False)
    probe, original, scores = OutputSQNR({"transformer": wan.transformer}, stats.calls), wan.transformer, {}
    for name in ("viditq-w8a8", "viditq-w4a8", "viditq-w4a8-video"):
        wan.transformer = copy.deepcopy(original)
        dqtk.quantize(wan, name, prompts=[prompt], call_kwargs=FEW, progress=False)
        scores[name] = probe("transformer", wan.transformer)
        attending = {"attn2" in path for path in quantized_layers(wan.transformer)}
        assert attending == ({False} if name.endswith("video") else {False, True})
        frames = wan(prompt, output_type="pt", generator=torch.Generator().manual_seed(0), max_sequence_length=16, **FEW).frames
        assert bool(torch.isfinite(frames).all())
    assert scores["viditq-w8a8"] > scores["viditq-w4a8-video"] + 6
    assert scores["viditq-w4a8-video"] > 10 < scores["viditq-w4a8"]


def test_from_the_shell_to_a_clip(tmp_path, capsys):
    """Allocate, quantize, save, load again, paint."""
    words = [
        "tiny-wan",
        "--widths",
        "3",
        "8",
        "--keep",
        "blocks.[1-9].*",
        "--keep",
        "*attn2*",
        "--budget",
        "14.5bits",
        "--steps",
        "1",
    ]
    words += ["--prompts", "a small red circle moving left slowly on a striped background"]
    assert main(["allocate", *words, "--output", str(tmp_path / "plan.json")]) == 0
    said = capsys.readouterr().out
    assert "scores rise with the bits of the weight at" in said
    plan = Plan.from_json(json.loads((tmp_path / "plan.json").read_text()))
    assert 8 * sum(c.bytes_after for c in plan.choices) <= 14.5 * sum(c.site.num_weights for c in plan.choices)
    assert main(["quantize", "tiny-wan", "--plan", str(tmp_path / "plan.json"), "--output", str(tmp_path / "wan")]) == 0
    again = dqtk.load(str(tmp_path / "wan"))
    again.set_progress_bar_config(disable=True)
    widths = {f"transformer:{path}": layer.spec.weight.bits for path, layer in quantized_layers(again.transformer).items()}
    assert widths == {c.site.id: c.spec.weight.bits for c in plan.choices if c.spec is not None}
    frames = again(
        "a small red circle", output_type="pt", generator=torch.Generator().manual_seed(0), max_sequence_length=16, **FEW
    )
    assert frames.frames.shape == (1, 5, 3, 32, 32)
    assert bool(torch.isfinite(frames.frames).all())

"""Concatenated inputs and constant first tokens: found by watching calls, on the meta device too, not by names."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dqtk
from dqtk.calibrate.look import concatenations, first_tokens, looked
from dqtk.calibrate.replay import Call
from dqtk.numerics.storage import layer_layout
from dqtk.numerics.vector_grid import width_of
from dqtk.plan import Choice
from dqtk.sites import Site, find_sites, meta
from dqtk.spec import (
    ConstantToken,
    Hadamard,
    Int,
    LayerSpec,
    PerChannel,
    PerGroup,
    PerTensor,
    ShortcutSplit,
    TensorSpec,
    Trellis,
    VectorCodebook,
)

CONFIGS = Path(__file__).parents[1] / "data" / "model_configs"
W8 = TensorSpec(format=Int(bits=8), granularity=PerChannel())
W4 = TensorSpec(format=Int(bits=4), granularity=PerGroup(size=16))
PAIRS = VectorCodebook(words=16, length=2)
STATIC = TensorSpec(format=Int(bits=8, symmetric=False), granularity=PerTensor())


@pytest.fixture(scope="module")
def sdxl():
    import diffusers

    config = json.loads((CONFIGS / "sdxl-base-1.0.json").read_text())
    return meta(diffusers.UNet2DConditionModel.from_config, config)


def test_sdxl_is_split_where_mixdq_splits_it(sdxl):
    """MixDQ's table of channels: 1280 four times, 640 three times, 320 twice; no other convolution."""
    with torch.device("meta"):
        added = {"text_embeds": torch.empty(2, 1280), "time_ids": torch.empty(2, 6)}
        given = {"sample": torch.empty(2, 4, 16, 16), "timestep": torch.empty(1), "encoder_hidden_states": torch.empty(2, 77, 2048)}
    sites = find_sites(sdxl, "unet")
    found = concatenations(sdxl, Call("unet", (), given | {"added_cond_kwargs": added}, 0.5), sites)
    convolutions = {site.path: found[site.path] for site in sites if site.kind == "conv" and site.path in found}
    assert list(convolutions) == [f"up_blocks.{i}.resnets.{j}.conv_shortcut" for i in range(3) for j in range(3)]
    assert list(convolutions.values()) == [(1280,)] * 4 + [(640,)] * 3 + [(320,)] * 2
    assert {site.path for site in sites if site.role == "shortcut_conv"} > set(convolutions)  # down blocks have some, of one tensor
    # Sine and cosine; pooled text and sizes.
    assert set(found) - set(convolutions) == {"time_embedding.linear_1", "add_embedding.linear_1"}


def test_sdxl_has_a_constant_token_for_every_key_and_value_of_the_text(sdxl):
    plan = dqtk.plan(sdxl, "mixdq-w8a8")
    assert len(plan.choices) == 794
    constant = [c for c in plan.choices if c.spec and ConstantToken() in c.spec.transforms]
    assert Counter(c.site.role for c in constant) == {"cross_attn.k": 70, "cross_attn.v": 70}
    vectors = [layer_layout(c.spec, c.site.n, c.site.k, c.site.channels)["token_output"] for c in constant]
    assert Counter(shape for shape, _ in vectors) == {(1280,): 120, (640,): 20}
    assert all(c.spec and ShortcutSplit() in c.spec.transforms for c in plan.choices if c.site.role == "shortcut_conv")
    assert plan.needs_stats


class Joined(nn.Module):
    """Layers behind concatenations of all kinds."""

    def __init__(self):
        super().__init__()
        names = ("direct", "normed", "active", "both", "three", "tokens", "grouped", "added", "alone")
        self.layers = nn.ModuleDict({name: nn.Linear(12, 4) for name in names})
        self.conv, self.behind, self.space = nn.Conv2d(12, 4, 1), nn.Conv2d(12, 4, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.norm = nn.GroupNorm(2, 12)

    def forward(self, a, b):
        x = torch.cat([a, b], dim=-1)
        layers = self.layers
        y = layers["direct"](x.to(torch.float64).float()) + layers["normed"](F.layer_norm(x, (12,)))
        y = y + layers["active"](F.dropout(F.silu(x), training=False)) + layers["added"](x + 1)
        y = (
            y
            + layers["three"](torch.concat((b[..., :2], torch.cat([a[..., :4], b], -1)), -1))
            + layers["alone"](torch.cat([x], -1))
        )
        y = y + layers["both"](torch.cat([x[:, :2], x[:, 2:]], dim=1)) + layers["tokens"](torch.cat([x, x], 1))[:, : x.shape[1]]
        picture = torch.cat([a, b], dim=-1).transpose(1, -1)[..., None]  # a view: no concatenation of channels any more
        y = y + self.space(torch.cat([picture[:, :6], picture[:, 6:]], dim=2)).sum()
        joined = torch.cat(tensors=[picture[:, :5], picture[:, 5:]], axis=1)
        y = y + self.conv(joined).sum() + self.behind(F.silu(self.norm(joined))).sum()
        return y + layers["grouped"](self.norm(x.transpose(1, 2)).transpose(1, 2))


def sites_of(module, component="transformer"):
    return find_sites(module, component)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_a_concatenation_and_what_is_not(device):
    with torch.device(device):
        module, a, b = Joined(), torch.zeros(2, 3, 6), torch.zeros(2, 3, 6)
    found = concatenations(module, Call("transformer", (), {"a": a, "b": b}, 0.5), sites_of(module))
    assert found == {
        "layers.direct": (6,),
        "layers.normed": (6,),
        "layers.active": (6,),
        "layers.three": (2, 6),
        "layers.alone": (6,),
        "conv": (5,),
    }


def test_a_layer_that_is_called_in_two_ways_stays_whole():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(torch.cat([x[..., :3], x[..., 3:]], -1)) + self.layer(x)

    module = Twice()
    assert concatenations(module, Call("transformer", (), {"x": torch.zeros(1, 2, 8)}, 0.5), sites_of(module)) == {}


# --- tokens ----------------------------------------------------------------------------------------------------------


class Reader(nn.Module):
    """A key layer on text, another on what was made of it, and one on latents."""

    def __init__(self):
        super().__init__()
        self.k, self.after, self.latent, self.pooled = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, sample, text, timestep):
        y = self.latent(sample) + self.after(torch.tanh(text)).sum() + self.pooled(text[:, 0]).sum()
        return y + self.k(text).sum() * timestep


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calls_of(texts, times=(9.0, 1.0)):
    return [
        Call("transformer", (), {"sample": seeded(len(text), 5, 8, seed=i), "text": text, "timestep": torch.tensor(t)}, t / 10, i)
        for i, text in enumerate(texts)
        for t in times
    ]


def text(seed, first=None):
    x = seeded(2, 4, 8, seed=seed)
    x[:, 0] = seeded(8, seed=77) * 20 if first is None else first
    return x


def test_a_token_is_found_wherever_it_is_read():
    module = Reader()
    found = first_tokens(module, calls_of([text(1), text(2)]), sites_of(module))
    assert set(found) == {"transformer:k", "transformer:after"}
    assert torch.equal(found["transformer:k"], (seeded(8, seed=77) * 20).bfloat16())


def test_zeros_of_an_empty_prompt_do_not_hide_it():
    module, mixed = Reader(), text(1)
    mixed[0] = 0
    assert set(first_tokens(module, calls_of([mixed, text(2)]), sites_of(module))) == {"transformer:k", "transformer:after"}


@pytest.mark.parametrize(
    "texts",
    [
        [text(1), text(2, first=seeded(8, seed=78) * 20)],
        [text(1), text(2, first=seeded(8, seed=77) * 21)],
        [text(1, first=0.0), text(2, first=0.0)],
        [text(1)[:1], text(1)[:1]],
        [text(1)[:, :1], text(2)[:, :1]],
    ],
    ids=["another", "larger", "zeros", "one prompt only", "one token"],
)
def test_what_is_no_constant_token(texts):
    module = Reader()
    assert first_tokens(module, calls_of(texts), [s for s in sites_of(module) if s.path == "k"]) == {}


# --- choices ---------------------------------------------------------------------------------------------------------


def choice(path, *transforms, weight=W8, shape=(4, 12), kind="linear"):
    site = Site(id=f"transformer:{path}", kind=kind, role="other", shape=shape, bias=True)
    return Choice(site=site, spec=LayerSpec(weight=weight, input=STATIC, transforms=transforms), why="test")


def joined_calls():
    return [Call("transformer", (), {"a": torch.zeros(2, 3, 6), "b": torch.zeros(2, 3, 6)}, 0.5)]


def test_answers_stand_in_the_specs():
    work = [
        choice("layers.direct", ShortcutSplit(), Hadamard()),
        choice("layers.added", ShortcutSplit()),
        choice("layers.three", ShortcutSplit(at=(1,))),
        replace(choice("layers.normed"), spec=None),
    ]
    with pytest.warns(UserWarning, match=r"layers\.direct stays whole: its input is joined of \[6, 6\] channels"):
        found, tokens = looked(Joined(), joined_calls(), work)
    assert tokens == {}
    assert [c.spec and c.spec.transforms for c in found] == [(Hadamard(),), (), (ShortcutSplit(at=(1,)),), None]
    (found,), _ = looked(Joined(), joined_calls(), [choice("layers.direct", ShortcutSplit())])
    assert found.spec.transforms == (ShortcutSplit(at=(6,)),)
    assert not found.spec.looks
    assert looked(Joined(), [], work[2:]) == (work[2:], {})


def test_groups_that_do_not_fit_the_parts():
    with pytest.warns(UserWarning, match="which its groups, vectors or branch do not fit"):
        (found,), _ = looked(Joined(), joined_calls(), [choice("layers.direct", ShortcutSplit(), weight=W4)])
    assert found.spec.transforms == ()


@pytest.mark.parametrize(
    ("form", "widths"), [(VectorCodebook(words=16, length=4, books=2), (5, 7)), (Trellis(bits=2), (6, 6))], ids=str
)
def test_vectors_that_do_not_fit_the_parts(form, widths):
    """The whole layer's channels are a multiple, which is all that a plan can see; its layer can still be made."""
    weight = TensorSpec(format=form, granularity=PerChannel())
    width = width_of(weight)
    assert not 12 % width
    name, kind, shape = ("conv", "conv", (4, 12, 1, 1)) if widths == (5, 7) else ("layers.direct", "linear", (4, 12))
    with pytest.warns(UserWarning, match=rf"{name} stays whole.*joined of \[{widths[0]}, {widths[1]}\].*vectors or branch do not"):
        (found,), _ = looked(Joined(), joined_calls(), [choice(name, ShortcutSplit(), weight=weight, shape=shape, kind=kind)])
    assert found.spec.transforms == ()
    assert layer_layout(found.spec, 4, 12, 12)
    (fits,), _ = looked(Joined(), joined_calls(), [choice("layers.direct", ShortcutSplit(), weight=replace(weight, format=PAIRS))])
    assert fits.spec.transforms == (ShortcutSplit(at=(6,)),)
    assert layer_layout(fits.spec, 4, 12, 12)


def test_a_token_that_is_none_is_left_out():
    module = Reader()
    work = [choice(path, ConstantToken(), shape=(8, 8)) for path in ("k", "latent")]
    (k, latent), tokens = looked(module, calls_of([text(1), text(2)]), work)
    assert (k.spec.transforms, latent.spec.transforms) == ((ConstantToken(),), ())
    assert set(tokens) == {"transformer:k"}


def test_nothing_to_look_at():
    with pytest.raises(ValueError, match="calls of transformer must have been kept, got none"):
        looked(Joined(), [], [choice("conv", ShortcutSplit())])

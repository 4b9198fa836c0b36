"""Every family's attentions, on small random models: dense attention comes back in any order, and masks hold for its text."""

from dataclasses import replace

import pytest
import torch

from dqtk.attention.choose import choose, place_attention
from dqtk.calibrate.replay import Call
from dqtk.calls import layouts_of
from dqtk.nn.attention import blocks_of, remove_blocks
from dqtk.sites import find_attention
from dqtk.spec import AttentionSpec, Int, Radial, Recall, StaticBlocks

DRAW = torch.Generator().manual_seed(0)


def noise(*shape):
    return torch.randn(*shape, generator=DRAW)


def wan():
    from diffusers import WanTransformer3DModel

    sizes = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 2, "rope_max_seq_len": 32}
    model = WanTransformer3DModel(**sizes, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32)
    call = {"hidden_states": noise(1, 4, 3, 8, 12), "encoder_hidden_states": noise(1, 7, 16)}
    return model, call | {"timestep": torch.tensor([500.0])}, {(3, 4, 6, 0, 0)}, 2


def flux():
    from diffusers import FluxTransformer2DModel

    sizes = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    model = FluxTransformer2DModel(
        **sizes, in_channels=8, joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6)
    )
    ids = torch.zeros(6, 5, 3)
    ids[..., 1], ids[..., 2] = torch.arange(6)[:, None], torch.arange(5)
    call = {"hidden_states": noise(1, 30, 8), "encoder_hidden_states": noise(1, 9, 16), "pooled_projections": noise(1, 8)}
    call |= {"timestep": torch.tensor([0.5]), "img_ids": ids.reshape(30, 3), "txt_ids": torch.zeros(9, 3)}
    return model, call | {"guidance": None}, {(1, 6, 5, 9, 0)}, 2


def sd3():
    from diffusers import SD3Transformer2DModel

    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32}
    model = SD3Transformer2DModel(
        **sizes, sample_size=16, in_channels=4, joint_attention_dim=16, pooled_projection_dim=8, pos_embed_max_size=16
    )
    call = {"hidden_states": noise(1, 4, 12, 16), "encoder_hidden_states": noise(1, 9, 16), "pooled_projections": noise(1, 8)}
    return model, call | {"timestep": torch.tensor([500.0])}, {(1, 6, 8, 0, 9), (1, 6, 8, 0, 0)}, 2


def cogvideox():
    from diffusers import CogVideoXTransformer3DModel

    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "text_embed_dim": 16, "max_text_seq_length": 9}
    model = CogVideoXTransformer3DModel(
        **sizes, in_channels=4, out_channels=4, time_embed_dim=16, sample_width=12, sample_height=8, sample_frames=9
    )
    call = {"hidden_states": noise(1, 3, 4, 8, 12), "encoder_hidden_states": noise(1, 9, 16), "timestep": torch.tensor([500])}
    return model, call, {(3, 4, 6, 9, 0)}, 2


def hunyuan_video():
    from diffusers import HunyuanVideoTransformer3DModel

    sizes = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    model = HunyuanVideoTransformer3DModel(
        **sizes,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        patch_size_t=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
        guidance_embeds=False,
    )
    mask = torch.ones(1, 9)
    mask[:, 6:] = 0  # padding, which nobody may see
    call = {"hidden_states": noise(1, 4, 3, 8, 12), "encoder_hidden_states": noise(1, 9, 16), "pooled_projections": noise(1, 8)}
    call |= {"timestep": torch.tensor([500.0]), "encoder_attention_mask": mask}
    return model, call, {(3, 4, 6, 0, 9), (1, 1, 9, 0, 0)}, 3


def ltx():
    from diffusers import LTXVideoTransformer3DModel

    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}
    model = LTXVideoTransformer3DModel(**sizes, in_channels=8, out_channels=8, caption_channels=16)
    call = {"hidden_states": noise(1, 72, 8), "encoder_hidden_states": noise(1, 9, 16), "timestep": torch.tensor([500.0])}
    call |= {"encoder_attention_mask": torch.ones(1, 9), "num_frames": 3, "height": 4, "width": 6}
    return model, call, {(3, 4, 6, 0, 0)}, 2


def sdxl():
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=8,
    )
    call = {"sample": noise(1, 4, 10, 12), "timestep": torch.tensor(500), "encoder_hidden_states": noise(1, 7, 16)}
    return model, call, {(1, 10, 12, 0, 0), (1, 5, 6, 0, 0)}, 7


FAMILIES = [wan, flux, sd3, cogvideox, hunyuan_video, ltx, sdxl]


@pytest.fixture(params=FAMILIES, ids=lambda build: build.__name__)
def family(request):
    torch.manual_seed(0)
    model, call, layouts, num = request.param()
    return model.requires_grad_(False).eval(), call, layouts, num


def answer(model, call):
    with torch.no_grad():
        return model(**call, return_dict=False)[0]


def placed(model, call, spec):
    calls = [Call("model", (), call, 0.5)]
    for chosen in choose(model, calls, dict.fromkeys(find_attention(model), spec)):
        place_attention(model, chosen)


def test_layouts_are_those_of_the_call(family):
    model, call, layouts, num = family
    assert {layout.numbers for layout in layouts_of(model, call).values()} == layouts
    assert len(find_attention(model)) == num


def test_reordered_and_dense_is_the_same(family):
    model, call, _, num = family
    expected = answer(model, call)
    spec = AttentionSpec(order=Recall(), mask=StaticBlocks(density=1.0), block=(16, 16))
    placed(model, call, spec)
    for blocks in blocks_of(model).values():  # whatever was chosen: some other order
        blocks.spec = replace(blocks.spec, orders=tuple(5 if blocks.spec.layout[0] > 1 else 1 for _ in range(blocks.heads)))
    assert len(blocks_of(model)) == num
    torch.testing.assert_close(answer(model, call), expected, rtol=1e-4, atol=1e-5)
    remove_blocks(model)
    assert torch.equal(answer(model, call), expected)


def test_sparse_integers_run(family):
    model, call, _, _ = family
    expected = answer(model, call)
    spec = AttentionSpec(mask=Radial(density=0.3), block=(16, 16), qk=Int(bits=8), pv=Int(bits=8))
    placed(model, call, spec)
    found = answer(model, call)
    assert torch.isfinite(found).all()
    assert 0 < float((found - expected).norm() / expected.norm()) < 1


def test_padding_stays_unseen():
    torch.manual_seed(0)
    model, call, _, _ = hunyuan_video()
    model.requires_grad_(False).eval()
    placed(model, call, AttentionSpec(order=Recall(), mask=StaticBlocks(density=0.8), block=(16, 16)))
    before = answer(model, call)
    text = call["encoder_hidden_states"].clone()
    text[:, 6:] += 10
    torch.testing.assert_close(answer(model, call | {"encoder_hidden_states": text}), before)

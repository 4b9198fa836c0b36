"""LoRA by PEFT on top of quantized layers: it works unmerged, learns, comes off again, and is never lost in a merge."""

import copy

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

import dqtk
from dqtk.numerics.codebook import nf4
from dqtk.spec import Dynamic, E4M3Group, E8M0Group, Float, Hadamard, LayerSpec, PerGroup, TensorSpec

E2M1 = Float(exponent=2, mantissa=1)
NVFP4 = LayerSpec(
    weight=TensorSpec(format=E2M1, granularity=E4M3Group(size=8)),
    input=TensorSpec(format=E2M1, granularity=E4M3Group(size=8), range=Dynamic()),
    transforms=(Hadamard(),),
)
NF4 = LayerSpec(weight=TensorSpec(format=nf4(), granularity=PerGroup(size=8)))
MXFP8 = LayerSpec(
    weight=TensorSpec(format=Float(), granularity=E8M0Group(size=8)),
    input=TensorSpec(format=Float(), granularity=E8M0Group(size=8), range=Dynamic()),
)
TARGETS = ["first", "second", "conv"]
COMBINATIONS = [("w8", "w4", "w8"), ("w8a8", "w4a8-rtn", "w4a8-rtn"), ("fp8", "wfp8", "w8a8-static"), (NVFP4, NF4, MXFP8)]


def short(kinds):
    return ", ".join(map(str, kinds))


def config(**options):
    return LoraConfig(r=2, target_modules=TARGETS, **options)


def batch():
    return torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kinds", COMBINATIONS, ids=short)
def test_effect_is_that_of_the_low_rank_product(small, kinds):
    """Against the same adapter on plain layers: the first layer's output gains B A x."""
    model, x = small(*kinds), batch()
    without = model.first(x)
    adapted = inject_adapter_in_model(config(init_lora_weights=False), model)
    lora = adapted.first
    expected = without + lora.scaling["default"] * (x @ lora.lora_A["default"].weight.T @ lora.lora_B["default"].weight.T)
    torch.testing.assert_close(adapted.first(x), expected)
    assert not torch.allclose(adapted.first(x), without)


@pytest.mark.parametrize("kinds", COMBINATIONS, ids=short)
def test_fresh_adapter_changes_nothing_and_comes_off(small, kinds):
    model, x = small(*kinds), batch()
    expected = model(x)
    kind = [type(part) for part in (model.first, model.second, model.conv)]
    adapted = get_peft_model(model, config())
    assert torch.equal(adapted(x), expected)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.normal_()
    assert not torch.allclose(adapted(x), expected)
    with adapted.disable_adapter():
        assert torch.equal(adapted(x), expected)
    restored = adapted.unload()
    assert [type(part) for part in (restored.first, restored.second, restored.conv)] == kind
    assert torch.equal(restored(x), expected)


@pytest.mark.parametrize("kinds", COMBINATIONS, ids=short)
@pytest.mark.parametrize("safe", [True, False])
def test_merging_raises_and_the_adapter_stays(small, kinds, safe):
    adapted, x = get_peft_model(small(*kinds), config(init_lora_weights=False)), batch()
    expected = adapted(x)
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(RuntimeError, match=r"cannot be changed in place .*Keep the adapter unmerged"):
            merge(safe_merge=safe)
        assert torch.equal(adapted(x), expected)


def test_adapters_live_in_the_compute_dtype(small):
    adapted = get_peft_model(small("w4", "w4a8-rtn", "w8a8").bfloat16(), config(), autocast_adapter_dtype=False)
    assert {p.dtype for name, p in adapted.named_parameters() if "lora_" in name} == {torch.bfloat16}
    assert adapted(batch().bfloat16()).dtype == torch.bfloat16


def train(model, x, steps=20):
    """Losses of learning to paint a fixed target."""
    target = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(4))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(steps):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kinds", COMBINATIONS, ids=short)
def test_training(small, kinds):
    """Gradients reach the first layer's adapter through all quantized ones, and descend."""
    model, x = small(*kinds), batch()
    frozen = copy.deepcopy(model.state_dict())
    adapted = get_peft_model(model, config())
    losses = train(adapted, x)
    assert losses[-1] < 0.8 * losses[0]
    first = adapted.base_model.model.first
    assert first.lora_B["default"].weight.abs().sum() > 0
    for name, value in adapted.unload().state_dict().items():
        assert torch.equal(value.float(), frozen[name].float())


def test_gradient_checkpointing(small):
    """Same gradients when the quantized part is run again in the backward pass."""
    adapted, x = get_peft_model(small("w8a8", "w4a8-rtn", "w4"), config(init_lora_weights=False)), batch()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    plain = torch.autograd.grad(adapted(x).square().sum(), trained)
    y = torch.utils.checkpoint.checkpoint(adapted, x, use_reentrant=False)
    again = torch.autograd.grad(y.square().sum(), trained)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def test_saved_adapters_hold_adapters_only(small):
    state = peft.get_peft_model_state_dict(get_peft_model(small(), config()))
    assert len(state) == 6
    assert all("lora_" in name for name in state)


def test_a_model_that_wears_an_adapter_is_not_saved(load_tiny, tmp_path):
    """Its folder could not be loaded: neither the codes nor the adapter would be found under their names."""
    pipe = load_tiny("sdxl")
    dqtk.quantize(pipe, "w8a8", progress=False)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"save: model must be saved without adapters .*base_layer.*unload them first"):
        dqtk.save(pipe, tmp_path / "q")
    assert not (tmp_path / "q").exists()

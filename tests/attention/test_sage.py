"""The adapter to an installed SageAttention, with a stand-in for it: asked for in a plan, refused where it does not fit."""

import importlib.machinery
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import dqtk
from dqtk.kernels import attention_check, sage
from dqtk.nn.attention import blocks_of
from dqtk.ops import report_of_attention
from dqtk.spec import AttentionSpec, Int, Radial, Sage

RECIPE = dqtk.Recipe(name="none", rules=())


def rounded(q, k, v, tensor_layout, is_causal, sm_scale, **ignored):
    """What the package computes, in floating point: keys less their mean, queries and keys as INT8 with a scale per token."""
    assert (tensor_layout, is_causal, ignored) == ("HND", False, {})
    k = k.float() - k.float().mean(2, keepdim=True)
    q, k = ((x / (step := x.abs().amax(-1, keepdim=True) / 127)).round() * step for x in (q.float(), k))
    return F.scaled_dot_product_attention(q, k, v.float(), scale=sm_scale).to(v.dtype)


@pytest.fixture
def package(monkeypatch):
    """Function (its answer) -> ``sageattention`` is installed and takes CPUs; a list of the shapes that it was given."""
    seen = []

    def install(answer=rounded):
        module = types.ModuleType("sageattention")
        module.__spec__ = importlib.machinery.ModuleSpec("sageattention", None)
        module.sageattn = lambda q, *rest, **named: seen.append(tuple(q.shape)) or answer(q, *rest, **named)
        monkeypatch.setitem(sys.modules, "sageattention", module)
        monkeypatch.setattr(sage, "DEVICES", ("cuda", "cpu"))
        attention_check.forget()
        return seen

    yield install
    attention_check.forget()


def given(dtype=torch.bfloat16, channels=24):
    return [torch.randn(2, 3, 70, channels, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]


@pytest.fixture
def pipe(load_tiny):
    return load_tiny("pixart", torch.bfloat16)


def test_it_must_be_installed_before_anything_changes(pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "sageattention", None)
    plan = dqtk.plan(pipe, "w8a8", attention="sage")
    assert "an error: sageattention is not installed" in plan.explain()
    with pytest.raises(ValueError, match=r"quantize: sageattention must be installed for .*, got none. pip install sageattention"):
        dqtk.quantize(pipe, plan, progress=False)
    assert not blocks_of(pipe.transformer)
    with pytest.raises(ValueError, match="attention: sageattention must be installed"):
        sage.sage_attention(*given(), 0.2)


def test_it_attends(package):
    seen, (q, k, v) = package(), given()
    y = sage.sage_attention(q, k, v, 0.2)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.2)
    assert float((y - exact).norm() / exact.norm()) < 0.03
    assert seen == [(1, 2, 70, 24), (2, 3, 70, 24)]  # the first call is looked at
    torch.library.opcheck(sage.sage_attention, (q, k, v, 0.2))


@pytest.mark.parametrize(
    "wrong", [lambda q, k, v, **_: torch.randn_like(q), lambda q, k, v, **_: q * float("nan")], ids=["noise", "nan"]
)
def test_a_wrong_version_draws_nothing(package, wrong):
    package(wrong)
    with pytest.raises(ValueError, match=r"attention: sageattention unknown on cpu must answer as torch's own attention does"):
        sage.sage_attention(*given(), 0.2)


def test_what_it_does_not_take(package, monkeypatch):
    package()
    for inputs, message in (
        (given(torch.float32), "dtype must be bfloat16 or float16 for sageattention, got float32"),
        (given(channels=160), "channels of a head must be at most 128 for sageattention, got 160"),
        ([given()[0], *given(channels=16)[1:]], "shapes must be the same"),
    ):
        with pytest.raises(ValueError, match=message):
            sage.sage_attention(*inputs, 0.2)
    monkeypatch.setattr(sage, "DEVICES", ("cuda",))
    with pytest.raises(ValueError, match=r"attention: device must be cuda for sageattention, got cpu. Plan another attention"):
        sage.sage_attention(*given(), 0.2)


def test_in_a_pipeline_saved_and_loaded(package, pipe, load_tiny, draw, tmp_path, monkeypatch):
    seen = package()
    plain = draw(load_tiny("pixart", torch.bfloat16))
    dqtk.quantize(pipe, dqtk.plan(pipe, RECIPE, attention="sage"), progress=False)
    drawn = draw(pipe)
    assert seen
    assert 0 < float((drawn.float() - plain.float()).abs().mean()) < 0.05
    dqtk.save(pipe, tmp_path / "saved")
    assert torch.equal(draw(dqtk.load(tmp_path / "saved")), drawn)
    monkeypatch.setitem(sys.modules, "sageattention", None)
    with pytest.raises(ValueError, match="sageattention must be installed"):
        dqtk.load(tmp_path / "saved")


def test_masks_are_refused_and_gradients_are_torchs(package, pipe):
    seen = package()
    dqtk.quantize(pipe, dqtk.plan(pipe, RECIPE, attention="sage"), progress=False)
    blocks = next(iter(blocks_of(pipe.transformer).values()))
    q, k, v = given()
    with pytest.raises(ValueError, match="attention: a mask must be left out for sageattention, which drops it, got one of"):
        blocks(q, k, v, torch.ones(1, 70, dtype=torch.bool), 0.2)
    q.requires_grad_()
    blocks(q, k, v, torch.ones(1, 70, dtype=torch.bool), 0.2).sum().backward()
    assert q.grad is not None
    assert not seen
    assert blocks.density() == 1


def test_specs_leave_everything_to_it():
    with pytest.raises(ValueError, match=r"order, mask and rounding must be left out with Sage\(\), which decides them, got QK8"):
        AttentionSpec(kernel=Sage(), qk=Int(bits=8))
    with pytest.raises(ValueError, match=r"got 16 bit, 0\.30 of 64x64 blocks"):
        AttentionSpec(kernel=Sage(), mask=Radial(density=0.3))
    with pytest.raises(ValueError, match="density must be left out for sage"):
        dqtk.recipes.attention_named("sage", 0.3)


def test_reports(package):
    package()
    spec = AttentionSpec(kernel=Sage())
    assert report_of_attention(spec, "cuda") == "sageattention unknown, the installed package"
    assert report_of_attention(spec, "cpu") == "an error: sageattention is for CUDA devices"

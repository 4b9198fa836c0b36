"""Live blocks through torch's FlexAttention, compiled for this CPU: the same numbers, only where it is asked for, checked first."""

import pytest
import torch

from dqtk.gpu import flex
from dqtk.kernels import block_attention
from dqtk.numerics.block_masks import pack
from dqtk.ops import report_of_attention
from dqtk.spec import AttentionSpec, Int, SlidingTile

pytestmark = pytest.mark.usefixtures("look_again")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture
def calls(monkeypatch):
    """Function (what becomes of its answers) -> a list of the calls that it answers from now on."""
    monkeypatch.setenv("DQTK_FLEX", "on")
    right, seen = flex.block_attention, []

    def answers(change=lambda y: y):
        def spied(*given):
            seen.append(given)
            return change(right(*given))

        monkeypatch.setattr(flex, "block_attention", spied)
        return seen

    return answers


def drawn(dtype, tokens, channels, mask=None, block=(64, 64)):
    """Arguments of the op, two heads of two samples; one row of blocks sees nothing."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, tokens, 2, channels, generator=draw).to(dtype).transpose(1, 2) for _ in range(3))
    order = torch.stack([torch.randperm(tokens, generator=draw) for _ in range(2)]).to(torch.int32)
    live = torch.rand(2, -(-tokens // block[0]), -(-tokens // block[1]), generator=draw) < 0.5
    live[:, 1] = False
    if mask == "keys":
        mask = torch.rand(2, 1, 1, tokens, generator=draw) > 0.2
    elif mask == "scores":
        mask = torch.randn(2, tokens, tokens, generator=draw).to(dtype)
    return q, k, v, order, live, mask, block


def exact(q, k, v, order, live, mask, block):
    """float64, with the whole matrix of scores in the original order."""
    num = q.shape[2]
    new = live.repeat_interleave(block[0], 1).repeat_interleave(block[1], 2)[:, :num, :num]
    place = order.long().argsort(1)
    seen = torch.stack([s[p][:, p] for s, p in zip(new, place, strict=True)])
    scores = q.double() @ k.double().mT * 0.2
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    return scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0) @ v.double()


def answer(q, k, v, order, live, mask, block, bits=16):
    return block_attention(q, k, v, order, None if live is None else pack(live), mask, *block, 0.2, bits, bits, "row", "none")


@pytest.mark.parametrize(
    ("dtype", "tokens", "channels", "mask", "block"),
    [
        (torch.float32, 257, 72, None, (64, 64)),
        (torch.bfloat16, 300, 64, "keys", (128, 64)),
        (torch.float32, 100, 24, "scores", (16, 16)),
    ],
)
def test_answers_are_those_of_float64(calls, dtype, tokens, channels, mask, block):
    seen, given = calls(), drawn(dtype, tokens, channels, mask, block)
    y, expected = answer(*given), exact(*given)
    assert len(seen) == 2  # it was looked at first
    assert float((y.double() - expected).norm() / expected.norm()) < TOLERANCE[dtype]
    nothing = expected.abs().amax(-1) == 0
    assert nothing.any()
    assert y[nothing].abs().max() == 0
    assert y.transpose(1, 2).is_contiguous()


def test_integers_whole_sequences_odd_blocks_and_calls_that_did_not_ask_are_not_its(calls, monkeypatch):
    seen = calls()
    q, k, v, order, live, mask, block = drawn(torch.float32, 100, 16)
    answer(q, k, v, order, live, mask, block, bits=8)
    answer(q, k, v, order, None, mask, block)
    odd = torch.ones(2, 10, 10, dtype=torch.bool)
    answer(q, k, v, order, odd, mask, (10, 10))
    monkeypatch.delenv("DQTK_FLEX")
    answer(q, k, v, order, live, mask, block)
    assert not seen


def test_a_compiled_model_calls_it(calls):
    seen, (q, k, v, order, live, mask, block) = calls(), drawn(torch.float32, 100, 24, block=(16, 16))
    kept = pack(live)

    def attend(q, k, v):
        return block_attention(q * 2, k, v, order, kept, mask, *block, 0.2, 16, 16, "row", "none") + 1

    y, expected = torch.compile(attend, fullgraph=True)(q, k, v), exact(q * 2, k, v, order, live, mask, block) + 1
    assert len(seen) == 2
    assert float((y.double() - expected).norm() / expected.norm()) < TOLERANCE[torch.float32]


def test_a_wrong_answer_is_refused(calls):
    calls(lambda y: y * 1.1)
    said = r"attention: torch's FlexAttention on cpu must answer as torch's own attention does, .* Without DQTK_FLEX it is not used"
    with pytest.raises(ValueError, match=said):
        answer(*drawn(torch.float32, 128, 16))


def test_another_setting_is_refused(monkeypatch):
    monkeypatch.setenv("DQTK_FLEX", "yes")
    with pytest.raises(ValueError, match=r"DQTK_FLEX must be on or unset, got 'yes'\. Unset it for dqtk's own kernels\."):
        flex.wanted()


def test_reports_say_so(monkeypatch):
    blocks = AttentionSpec(mask=SlidingTile(density=0.5))
    assert "FlexAttention" not in report_of_attention(blocks, "xpu")
    monkeypatch.setenv("DQTK_FLEX", "on")
    assert report_of_attention(blocks, "xpu") == "live blocks, torch's FlexAttention"
    assert "FlexAttention" not in report_of_attention(AttentionSpec(mask=SlidingTile(density=0.5), qk=Int(bits=8)), "xpu")

"""A kernel of attention that is wrong is found at its first call, and nothing is answered with it."""

import pytest
import torch

from dqtk import native
from dqtk.kernels import block_attention
from dqtk.numerics.block_masks import pack

pytestmark = pytest.mark.usefixtures("look_again")
SHAPE = (2, 3, 200, 24)


@pytest.fixture
def calls(monkeypatch):
    """Function (what becomes of the right answer) -> native kernels answer that from now on; a list of what they were given."""
    if native.load() is None:
        pytest.skip(native.describe()[1])
    right, seen = native.block_attention, []

    def answers(change):
        def wrong(*given):
            seen.append(given)
            return change(right(*given))

        monkeypatch.setattr(native, "block_attention", wrong)
        return seen

    return answers


def inputs(dtype=torch.float32, tokens=200):
    b, h, _, d = SHAPE
    return [torch.randn(b, tokens, h, d, generator=torch.Generator().manual_seed(i)).to(dtype).transpose(1, 2) for i in range(3)]


def settings(bits=16, tokens=200, mask=None, density=0.5):
    draw = torch.Generator().manual_seed(3)
    order = torch.stack([torch.randperm(tokens, generator=draw) for _ in range(3)]).to(torch.int32)
    blocks = -(-tokens // 64)
    live = pack(torch.rand(3, blocks, blocks, generator=draw) < density)
    return order, live, mask, 64, 64, 0.2, bits, bits, "row", "none" if bits == 16 else "qk"


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_kernels_pass_and_are_looked_at_once_per_kind(calls, bits, dtype):
    seen = calls(lambda y: y)
    mask = torch.randn(3, 200, 200) > -1
    expected = block_attention(*inputs(dtype), *settings(bits, mask=mask))
    assert len(seen) == 2
    assert tuple(seen[0][1].shape) == (1, 2, 200, 24)  # first sample, first and last head
    assert (seen[0][5].any(-1).sum(1) <= 2).all()  # of whose blocks of queries two see something
    assert torch.equal(block_attention(*inputs(dtype), *settings(bits, mask=mask)), expected)
    assert len(seen) == 3
    block_attention(*inputs(dtype), *settings(bits))  # no mask: another kind
    assert len(seen) == 5
    block_attention(*inputs(dtype, 400), *settings(bits, 400))  # twice as many tokens
    assert len(seen) == 7


WRONG = {
    "noise": lambda y: torch.randn_like(y),
    "nan": lambda y: y * float("nan"),
    "black": lambda y: torch.zeros_like(y),
    "scaled": lambda y: 1.2 * y,
    "heads in another order": lambda y: y.flip(1),
    "rows in another order": lambda y: y.roll(1, 2),
}


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("how", WRONG)
def test_wrong_kernels_are_an_error(calls, how, bits):
    calls(WRONG[how])
    for _ in range(2):  # it does not pass the second time
        with pytest.raises(
            ValueError,
            match=r"attention: native \(.*\) on cpu must answer as torch's own attention does, within .*, got .*DQTK_NATIVE=off",
        ):
            block_attention(*inputs(), *settings(bits))


def test_what_is_not_finite_is_not_judged(calls):
    seen = calls(lambda y: y)
    q, k, v = inputs()
    v[0, 0, 3, 2] = float("nan")
    assert not block_attention(q, k, v, *settings(density=1.0)).isfinite().all()
    block_attention(q, k, v, *settings(density=1.0))
    assert len(seen) == 4  # it has not passed


@pytest.mark.parametrize("mask", [None, torch.ones(200, dtype=torch.bool), torch.zeros(200, 200), torch.zeros(2, 1, 1, 200)])
@pytest.mark.parametrize("tokens", [200, 1])
def test_every_kind_can_be_looked_at(mask, tokens):
    mask = mask if mask is None or tokens == 200 else mask[..., :1]
    if mask is not None and mask.ndim == 2 and tokens == 1:
        mask = mask[:1]
    for dtype in (torch.float32, torch.float16):
        order, live, _, *rest = settings(tokens=tokens, mask=mask)
        for given in ((order, live), (None, live), (order, None), (None, None)):
            assert block_attention(*inputs(dtype, tokens), *given, mask, *rest).isfinite().all()

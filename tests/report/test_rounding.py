"""Another rounding of the same arithmetic, and everything put back afterwards."""

import pytest
import torch

from dqtk.report.rounding import ROUNDINGS, check_rounding, other_rounding


def settings():
    backends = torch.backends
    return torch.get_num_threads(), backends.mkldnn.enabled, backends.cuda.flash_sdp_enabled(), backends.cudnn.enabled


@pytest.mark.parametrize("kind", [*ROUNDINGS, None])
def test_values_stay_and_settings_come_back(kind):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 70, 16).unbind()
    before, want = settings(), torch.nn.functional.scaled_dot_product_attention(q, k, v)
    try:
        with other_rounding(kind):
            got = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            assert settings() != before or kind is None
            raise KeyError
    except KeyError:
        pass
    assert torch.allclose(got, want, atol=1e-5)
    assert settings() == before


def test_kernels_round_differently():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 700, 64).unbind()
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    with other_rounding("kernels"):
        got = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert not torch.equal(got, want)


def test_an_unknown_word():
    with (
        pytest.raises(ValueError, match=r"floor: rounding must be one of kernels, threads, got 'bf16'\. Or pass a pipeline\."),
        other_rounding("bf16"),
    ):
        pass


def test_threads_round_differently():
    torch.manual_seed(0)
    x, before = torch.randn(2_000_003), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        want = x.sum()
        with other_rounding("threads"):
            assert torch.get_num_threads() == 1
            assert x.sum() != want
        assert x.sum() == want
    finally:
        torch.set_num_threads(before)


def test_threads_of_the_cpu_are_no_floor_of_another_device():
    with pytest.raises(ValueError, match=r"compare: floor must change what cuda:0 computes, got 'threads', which are the CPU's\."):
        check_rounding("compare", "threads", "cuda:0")
    check_rounding("compare", "threads", "cpu")
    check_rounding("compare", "kernels", "cuda")

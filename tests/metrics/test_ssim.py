"""SSIM and MS-SSIM: an own float64 implementation, identities, orderings, the scale table."""

import pytest
import torch
import torch.nn.functional as F
from dqtk.metrics.psnr import psnr
from dqtk.metrics.ssim import BETAS, MIN_SIDE, ms_ssim, num_scales, ssim
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure, structural_similarity_index_measure


def _maps(x, y):
    """Luminance and contrast maps in float64: Wang et al. 2004, eq. 6 and 13, C3 = C2 / 2; window 11, sigma 1.5, reflected."""
    offset = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-offset.square() / (2 * 1.5**2))
    window = torch.outer(window, window) / window.sum() ** 2
    kernel = window.expand(3, 1, 11, 11)

    def mean(z):
        return F.conv2d(F.pad(z, (5, 5, 5, 5), mode="reflect"), kernel, groups=3)

    x, y = x.double(), y.double()
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    luminance = (2 * mx * my + 1e-4) / (mx**2 + my**2 + 1e-4)
    return luminance, (2 * vxy + 9e-4) / (vx + vy + 9e-4)


def _noisy(images, amount):
    generator = torch.Generator().manual_seed(1)
    return (images + amount * torch.randn(images.shape, generator=generator)).clamp(0, 1)


@pytest.fixture
def images():
    torch.manual_seed(0)
    return F.interpolate(torch.rand(3, 3, 8, 8), size=(64, 64), mode="bilinear")


def test_ssim_is_the_paper_in_float64(images):
    other = _noisy(images, 0.1)
    luminance, contrast = _maps(other, images)
    assert torch.allclose(ssim(other, images).double(), (luminance * contrast).mean(dim=(1, 2, 3)), atol=1e-9)


def test_ms_ssim_is_the_paper_in_float64(images):
    other = _noisy(images, 0.1)
    x, y, total = other.double(), images.double(), torch.ones(3, dtype=torch.float64)
    betas = torch.tensor(BETAS[:3], dtype=torch.float64) / sum(BETAS[:3])
    for scale, beta in enumerate(betas):
        luminance, contrast = _maps(x, y)
        inner = (..., slice(5, -5), slice(5, -5))  # torchmetrics leaves the padded border out of the contrast terms only
        term = (luminance * contrast).mean(dim=(1, 2, 3)) if scale == 2 else contrast[inner].mean(dim=(1, 2, 3))
        total = total * term**beta
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    assert torch.allclose(ms_ssim(other, images).double(), total, atol=1e-9)


@pytest.mark.parametrize("score", [ssim, ms_ssim])
def test_identity_order_symmetry_and_batch_independence(score, images):
    assert torch.allclose(score(images, images), torch.ones(3, dtype=torch.float64), atol=1e-9, rtol=0)
    values = [score(_noisy(images, amount), images) for amount in (0.02, 0.1, 0.3)]
    assert (values[0] > values[1]).all()
    assert (values[1] > values[2]).all()
    other = _noisy(images, 0.1)
    assert torch.allclose(score(other, images), score(images, other), atol=1e-6)
    assert torch.allclose(score(other, images)[1:2], score(other[1:2], images[1:2]), atol=1e-6)


@pytest.mark.parametrize("score", [ssim, ms_ssim])
def test_the_range_is_fixed_and_not_the_datas(score, images):
    """A pair's value must not change because a brighter pair shares its batch, nor by stretching the contrast of the data."""
    dim, other = images * 0.2, _noisy(images, 0.05) * 0.2
    alone = score(other, dim)
    together = score(torch.cat([other, torch.ones(1, 3, 64, 64)]), torch.cat([dim, torch.zeros(1, 3, 64, 64)]))[:3]
    assert torch.allclose(alone, together, atol=1e-6)


def test_number_of_scales_by_side():
    assert [num_scales(side) for side in (11, 21, 22, 43, 44, 64, 98, 99, 175, 176, 1024)] == [1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5]
    with pytest.raises(ValueError, match=r"ms_ssim: the shorter side must be at least 11 pixels, got 10\. Compare larger images\."):
        num_scales(10)
    with pytest.raises(ValueError, match=r"ssim: the shorter side must be at least 11 pixels, got 8\."):
        ssim(torch.zeros(1, 3, 8, 20), torch.zeros(1, 3, 8, 20))


@pytest.mark.parametrize("side", sorted(MIN_SIDE.values()))
def test_every_smallest_side_runs(side):
    torch.manual_seed(0)
    images = torch.rand(1, 3, side, side + 3)
    assert float(ms_ssim(images, images)) == pytest.approx(1, abs=1e-9)


def test_bf16_images(images):
    half = images.bfloat16()
    assert torch.allclose(ssim(half, half), torch.ones(3, dtype=torch.float64), atol=1e-9, rtol=0)
    assert ssim(half, images).dtype == torch.float64


@pytest.mark.parametrize("score", [ssim, ms_ssim])
@pytest.mark.parametrize("value", [0.0, 0.5, 0.97, 1.0])
def test_flat_pictures_equal_themselves(score, value):
    """Their variance is 0, and all that float32 left of it was rounding: 0.9987 for 0.97."""
    flat = torch.full((2, 3, 64, 64), value)
    assert torch.allclose(score(flat, flat), torch.ones(2, dtype=torch.float64), atol=1e-9, rtol=0)


def test_equals_scikit_image_in_float64_of_8_bit_pictures():
    """A frame of one colour makes the padding, which differs between the two, of no matter."""
    generator = torch.Generator().manual_seed(7)
    a = torch.full((1, 3, 64, 56), 0.8)
    a[..., 12:-12, 12:-12] = torch.rand(1, 3, 40, 32, generator=generator)
    b = a.clone()
    b[..., 12:-12, 12:-12] += 0.1 * torch.randn(1, 3, 40, 32, generator=generator)
    a, b = ((x.clamp(0, 1) * 255).round() / 255 for x in (a, b))
    options = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
    arrays = [x[0].permute(1, 2, 0).double().numpy() for x in (a, b)]
    _, everywhere = structural_similarity(*arrays, full=True, **options)
    assert float(ssim(a, b)) == pytest.approx(everywhere.mean(), abs=1e-9)


@pytest.mark.parametrize("side", [45, 102])
def test_equals_torchmetrics(side):
    generator = torch.Generator().manual_seed(2)
    a = torch.rand(2, 3, side, side + 6, generator=generator, dtype=torch.float64)
    b = (a + 0.3 * torch.randn(a.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    assert torch.allclose(ssim(a, b), structural_similarity_index_measure(a, b, data_range=1.0, reduction="none"), atol=1e-9)
    betas = torch.tensor(BETAS[: num_scales(side)])
    options = {"data_range": 1.0, "betas": tuple((betas / betas.sum()).tolist()), "normalize": "relu", "reduction": "none"}
    assert torch.allclose(ms_ssim(a, b), multiscale_structural_similarity_index_measure(a, b, **options), atol=1e-7)


def test_equals_scikit_image():
    """Gaussian window of 11 pixels, population covariance: the same definition in another library, away from the border."""
    generator = torch.Generator().manual_seed(4)
    a = torch.rand(1, 3, 48, 40, generator=generator, dtype=torch.float64)
    b = (a + 0.1 * torch.randn(a.shape, generator=generator, dtype=torch.float64)).clamp(0, 1)
    options = {"data_range": 1.0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 2}
    theirs = structural_similarity(a[0].permute(1, 2, 0).numpy(), b[0].permute(1, 2, 0).numpy(), **options)
    assert float(ssim(a, b)) == pytest.approx(theirs, abs=4e-3)  # theirs leaves a border of 5 pixels out of the mean
    assert float(psnr(a, b)) == pytest.approx(peak_signal_noise_ratio(a.numpy(), b.numpy(), data_range=1.0), abs=1e-9)

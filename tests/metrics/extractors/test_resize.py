"""The three resizes against independent references: PIL, and TensorFlow 1's bilinear written out in numpy loops."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dqtk.metrics.extractors.resize import as_pil, resize_clean, resize_legacy, resize_pytorch
from PIL import Image

SHAPES = [(11, 17), (5, 5), (1, 9), (40, 23), (13, 13)]


def noise(num, height, width):
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(0, 256, (num, 3, height, width), dtype=torch.uint8, generator=generator)


def tensorflow_1(image, size):
    """``ResizeBilinear`` with align_corners and half_pixel_centers off, one output pixel at a time; float32 as the kernel."""
    height, width, channels = image.shape
    image, out = image.astype(np.float32), np.zeros((size, size, channels), np.float32)
    scale_y, scale_x = np.float32(height) / np.float32(size), np.float32(width) / np.float32(size)
    for i in range(size):
        for j in range(size):
            y, x = np.float32(i) * scale_y, np.float32(j) * scale_x
            top, left = int(np.floor(y)), int(np.floor(x))
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            dy, dx = y - np.float32(top), x - np.float32(left)
            upper = image[top, left] + (image[top, right] - image[top, left]) * dx
            lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * dx
            out[i, j] = upper + (lower - upper) * dy
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_legacy_is_tensorflow_1_bit_by_bit(shape):
    x = noise(2, *shape)
    expected = np.stack([tensorflow_1(image.permute(1, 2, 0).numpy(), 13) for image in x])
    assert np.array_equal(resize_legacy(x, 13).permute(0, 2, 3, 1).numpy(), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_clean_is_pil_within_the_rounding_it_leaves_out(shape):
    """PIL's 8-bit bicubic rounds after each of its two passes: at most 1.5 grey levels from the float one, where nothing clips."""
    x = 96 + noise(2, *shape) // 4
    eight_bit = np.stack([np.asarray(image.resize((13, 13), Image.Resampling.BICUBIC)) for image in as_pil(x)])
    ours = resize_clean(x, 13).permute(0, 2, 3, 1).numpy()
    assert ours.dtype == np.float32
    assert np.abs(ours - eight_bit).max() <= 1.5
    if shape != (13, 13):  # not quantized again
        assert (ours != np.round(ours)).any()


def test_clean_channel_is_pils_float_image():
    x = noise(1, 40, 23)
    channel = Image.fromarray(x[0, 1].numpy().astype(np.float32)).resize((13, 13), Image.Resampling.BICUBIC)
    assert np.array_equal(resize_clean(x, 13)[0, 1].numpy(), np.asarray(channel).clip(0, 255))


def test_clean_clips_overshoot():
    x = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    x[..., 4:] = 255
    channel = np.asarray(Image.fromarray(x[0, 0].numpy().astype(np.float32)).resize((32, 32), Image.Resampling.BICUBIC))
    assert channel.max() > 255  # bicubic does overshoot here
    assert resize_clean(x, 32).amax() == 255
    assert resize_clean(x, 32).amin() == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_pytorch_is_interpolate(shape):
    x = noise(2, *shape)
    expected = F.interpolate(x.float() / 255, (13, 13), mode="bilinear", align_corners=False, antialias=False) * 255
    assert torch.allclose(resize_pytorch(x, 13), expected, atol=1e-3)


@pytest.mark.parametrize("resize", [resize_clean, resize_legacy, resize_pytorch])
def test_own_size_is_identity_and_layout_does_not_matter(resize):
    x = noise(2, 13, 13)
    assert torch.equal(resize(x, 13), x.float())
    wide = noise(2, 20, 31)
    assert torch.equal(resize(wide.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), 13), resize(wide, 13))


def test_they_differ():
    """One-pixel stripes at a quarter of the width: grey with antialiasing, or whatever columns happen to be read."""
    x = torch.zeros(1, 3, 52, 52, dtype=torch.uint8)
    x[..., ::2] = 255
    clean, legacy, pytorch = (resize(x, 13).mean().item() for resize in (resize_clean, resize_legacy, resize_pytorch))
    assert abs(clean - 127.5) < 3
    assert legacy == 255  # reads every fourth column, all white
    assert pytorch == pytest.approx(127.5)  # the mean of two neighbours
    assert resize_clean(x, 13)[..., 2:-2].std() < 0.1


def test_as_pil_keeps_pixels():
    x = noise(2, 5, 7)
    first, second = as_pil(x)
    assert first.mode == "RGB"
    assert first.size == (7, 5)
    assert np.array_equal(np.asarray(second), x[1].permute(1, 2, 0).numpy())

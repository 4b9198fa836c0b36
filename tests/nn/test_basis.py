"""The basis of inputs and stored weights, against explicit matrices in float64."""

import itertools

import pytest
import torch

from dqtk.nn.basis import Basis, block_of
from dqtk.numerics.hadamard import hadamard_matrix, pack_signs, random_signs, regular_hadamard
from dqtk.spec import Hadamard, Int, LayerSpec, PerChannel, Smooth, TensorSpec

WEIGHT = TensorSpec(format=Int(bits=8), granularity=PerChannel())
CHANNELS = 16
ROTATIONS = [Hadamard(), Hadamard(block=4), Hadamard(block=8), Hadamard(regular=True), Hadamard(block=4, regular=True)]
CHAINS = [(), (Smooth(),), *((r,) for r in ROTATIONS), *itertools.chain(*(((Smooth(), r), (r, Smooth())) for r in ROTATIONS))]


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SMOOTH, SIGNS = torch.exp2(seeded(CHANNELS, seed=5)), random_signs(CHANNELS, 3)


def matrix_of(transform):
    """z = x @ matrix, float64."""
    if isinstance(transform, Smooth):
        return torch.diag(SMOOTH.double())
    block = transform.block or CHANNELS
    h = (regular_hadamard if transform.regular else hadamard_matrix)(block)
    return torch.diag(SIGNS.double()) @ torch.block_diag(*[h] * (CHANNELS // block)) / block**0.5


def explicit(transforms):
    whole = torch.eye(CHANNELS, dtype=torch.float64)
    for transform in transforms:
        whole = whole @ matrix_of(transform)
    return whole


def basis(transforms):
    return Basis.of(LayerSpec(weight=WEIGHT, transforms=transforms), CHANNELS)


@pytest.mark.parametrize("transforms", CHAINS, ids=str)
def test_inputs_go_through_the_transforms_in_their_order(transforms):
    x = seeded(2, 3, CHANNELS)
    z = basis(transforms).apply(x, SMOOTH, pack_signs(SIGNS))
    torch.testing.assert_close(z.double(), x.double() @ explicit(transforms), rtol=1e-5, atol=1e-5)
    assert basis(transforms).apply(x.bfloat16(), SMOOTH, pack_signs(SIGNS)).dtype == torch.bfloat16


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("transforms", CHAINS, ids=str)
def test_undone_weights_are_those_of_the_layers_own_input(transforms, taps):
    """x undo(W)^T = apply(x) W^T, at every tap of a convolution."""
    w, x = seeded(5, taps * CHANNELS, seed=1), seeded(4, CHANNELS)
    own = basis(transforms).undo(w, SMOOTH, pack_signs(SIGNS))
    assert own.shape == w.shape
    z = basis(transforms).apply(x, SMOOTH, pack_signs(SIGNS))
    for mine, stored in zip(own.split(CHANNELS, 1), w.split(CHANNELS, 1), strict=True):
        torch.testing.assert_close(x @ mine.T, z @ stored.T, rtol=1e-4, atol=1e-4)


def test_blocks():
    assert block_of(Hadamard(), 24) == 24
    assert block_of(Hadamard(block=16), 24) == 12  # the largest that divides the width and has a matrix
    assert block_of(Hadamard(block=64), 3072) == 64
    assert block_of(Hadamard(regular=True), 32) == 16
    with pytest.raises(ValueError, match="width must be a positive multiple of 4, got 6"):
        block_of(Hadamard(), 6)

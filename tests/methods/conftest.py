"""Inputs with correlated columns, weights, and statistics of them, from seeds."""

import pytest
import torch

from dqtk.calibrate.gather import Inputs


def statistics(rows):
    """What calibration would keep of these rows [R, K], the products in float64."""
    x = rows.double()
    low, high = rows.float().amin(0).clamp(max=0), rows.float().amax(0).clamp(min=0)
    ends = {"low": low, "high": high, "peaks": rows.float()[:0]}
    return Inputs(gram=x.T @ x / len(x), mean=x.mean(0).float(), sample=rows.float(), count=len(rows), **ends)


@pytest.fixture(scope="session")
def stats_of():
    """Function rows [R, K] -> Inputs."""
    return statistics


@pytest.fixture(scope="session")
def seeded():
    """Function (shape..., seed) -> normal numbers."""
    return lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def correlated(seeded):
    """Function (R, K, seed) -> rows whose columns depend on each other and differ in size."""

    def make(num, k, seed=0):
        common = seeded(num, max(1, k // 8), seed=seed) @ seeded(max(1, k // 8), k, seed=seed + 1)
        return (common + 0.3 * seeded(num, k, seed=seed + 2)) * torch.exp2(seeded(k, seed=seed + 3))

    return make

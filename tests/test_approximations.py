"""What lets a backend compute a nearby matrix in linear time meets its tolerance, whatever the bound.

Axes: X, J places, M terms, K grid points, F frequencies.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.mixers import exponentials, interpolation


@pytest.mark.parametrize(("bound", "terms"), [(0.01, 2), (0.5, 4), (2.0, 8), (4.0, 12), (8.0, 24)])
def test_a_sum_of_few_exponentials_is_the_inverse_and_its_derivative_too(bound, terms):
    rates_M, weights_M = np.array(exponentials.exponentials(bound)).T
    assert len(rates_M) <= terms and weights_M.min() > 0 and rates_M.min() > 0
    x_X1 = np.exp(np.linspace(math.log(2) - bound, math.log(2) + bound, 20_011))[:, None]
    term_XM = weights_M * np.exp(-rates_M * x_X1)
    assert np.abs(term_XM.sum(1) * x_X1[:, 0] - 1).max() < 1.01e-4
    assert np.abs((rates_M * term_XM).sum(1) * x_X1[:, 0] ** 2 - 1).max() < 1.01e-3


@pytest.mark.parametrize("bound", [4e-3, 0.03, 0.05, 0.1, 0.13])
@pytest.mark.parametrize("length", [5, 300])
def test_cosines_come_back_from_a_grid_at_every_place_and_frequency(bound, length):
    grid = interpolation.grid(bound)
    points_K = grid.spacing * torch.arange(grid.size(length), dtype=torch.float64)
    weight_O = F.pad(grid.weights(torch.device("cpu")).double(), (0, length + grid.spacing * grid.size(length)))
    place_J1 = torch.arange(1, length + 1)[:, None]
    near_JK, far_JK = (place_J1 - points_K).abs().long(), (place_J1 + points_K).long()
    weights_JK = weight_O[near_JK] + weight_O[far_JK] * (points_K > 0)
    assert (grid.matrix(length, torch.device("cpu")) - weights_JK).abs().max() < 1e-6
    frequency_F = torch.linspace(-bound, bound, 101, dtype=torch.float64)
    wanted_JF = torch.cos(2 * math.pi * place_J1 * frequency_F)
    found_JF = weights_JK @ torch.cos(2 * math.pi * points_K[:, None] * frequency_F)
    assert (found_JF - wanted_JF).abs().max() < 1.01e-4
    assert grid.size(8192) < 8192 / grid.spacing + grid.taps + 16


@pytest.mark.parametrize(("taps", "bound"), [(6, 3e-5), (8, 1e-6)])
@pytest.mark.parametrize("size", [16, 500])
def test_cosines_come_back_from_even_frequencies(taps, bound, size):
    nonuniform = pytest.importorskip("bench.kernels.nonuniform")
    count = nonuniform._count(size)
    at_F = torch.linspace(0, count / 2, 1001, dtype=torch.float64)
    near_FM = at_F.floor()[:, None] + torch.arange(1 - taps // 2, 1 + taps // 2)
    under_FM = 1 - (2 * (at_F[:, None] - near_FM) / taps).square()
    window_FM = torch.exp(nonuniform.SHARPNESS * taps * (under_FM.sqrt() - 1))
    turns_K = torch.arange(size, dtype=torch.float64) / count
    found_FK = torch.einsum("fm,fmk->fk", window_FM, torch.cos(2 * math.pi * near_FM[..., None] * turns_K))
    found_FK *= nonuniform._correction(size, count, taps, torch.device("cpu"))[:, 0]
    assert (found_FK - torch.cos(2 * math.pi * at_F[:, None] * turns_K)).abs().max() < bound
    assert nonuniform.TAPS == {2: 6, 4: 8}


def test_too_fast_waves_have_no_coarse_grid():
    assert interpolation.grid(0.2) is None and interpolation.grid(0.5) is None

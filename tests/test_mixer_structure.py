"""What the class of each mixer promises, beyond the battery: closed forms and structure of its matrix."""

import math

import pytest
import torch
from tests.test_mixers import HEADS, LENGTH, WIDTH, assert_equal_ways, build, full, inputs, rank, segments_of

from bench.mixers.base import Features


@pytest.mark.parametrize("length", [12, 15])
def test_dft_is_the_real_part_of_the_unitary_transform_times_root_two(length):
    mixer, v, features, segments = full("dft", {"sam": False}, length)
    expected = math.sqrt(2) * torch.fft.fft(torch.eye(length, dtype=torch.float64), norm="ortho").real
    m = mixer.matrix(v, features, segments)
    torch.testing.assert_close(m, expected.expand_as(m))
    torch.testing.assert_close(m[..., 1:], m[..., 1:].flip(-1))  # columns j and n - j coincide
    assert rank(m) == length // 2 + 1


def test_dft_keeps_the_size_of_an_uncorrelated_v():
    mixer, v, features, segments = full("dft", {"sam": False})
    assert 0.9 < float(mixer(v, features, segments).norm() / v.norm()) < 1.1


def test_dft_places_are_exact_in_fp32_at_long_rows():
    mixer = build("dft", {"sam": False}, True, length=8192)
    v = torch.zeros(1, 8192, HEADS, WIDTH)
    row = torch.arange(8192, dtype=torch.float64) * 8191 % 8192
    expected = math.sqrt(2 / 8192) * torch.cos(2 * math.pi * row / 8192)
    torch.testing.assert_close(mixer.cosines(8192, v)[8191].double(), expected, rtol=0, atol=1e-8)

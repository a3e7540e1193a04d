"""The battery of the mixers on a CUDA device: fast paths, both backends of the scan, bf16, compilation."""

import dataclasses
import importlib.util

import pytest
import torch

from bench.check import Declared, check_mixer, subject_of
from bench.check.backends import compiled, errors, one_graph, plain
from bench.check.verb import everything
from bench.compose import make_where
from bench.mixers import lags
from bench.mixers.base import Features
from tests import wrong_mixers as wrong
from tests.conftest import rows_are_long
from tests.test_mixers import build, inputs, segments_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
KERNEL = pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="mamba-ssm is not installed")
BACKENDS = ["torch", pytest.param("mamba_ssm", marks=KERNEL)]
LONG = 300
FOUND = everything({}, make_where({"where.device": "cpu"}))  # every mixer of configs/mixer, at every level and form


def on_gpu(v, features: Features, segments, dtype=None) -> tuple[torch.Tensor, Features, torch.Tensor]:
    return v.to("cuda", dtype), Features(*(x.to("cuda", dtype) for x in features)), segments.cuda()


@pytest.mark.parametrize("found", FOUND.values(), ids=FOUND)
def test_the_conformance_suite_passes_on_the_device(found):
    """With a row for each further backend, which is skipped where its library is missing."""
    make, declared = found
    if importlib.util.find_spec("mamba_ssm") is None:
        declared = dataclasses.replace(declared, backends=())
    assert not [row for row in check_mixer(make, declared, device="cuda") if row.verdict == "fail"]


@pytest.mark.parametrize("found", FOUND.values(), ids=FOUND)
@pytest.mark.parametrize(("half", "bound"), [(False, 1e-4), (True, 3e-2)])
@pytest.mark.parametrize("packed", [False, True])
def test_forward_is_matrix_times_v_with_all_gradients(found, half, bound, packed):
    subject = subject_of(*found, full=False, device="cuda")
    figures = errors(subject, subject.make, packed, LONG, half, plain)
    assert all(figure <= bound for figure in figures.values()), figures


@pytest.mark.parametrize(("half", "bound"), [(False, 1e-4), (True, 3e-2)])
@pytest.mark.parametrize("label", [label for label in FOUND if label.startswith("toeplitz")])
def test_toeplitz_by_fourier_transforms(label, half, bound, monkeypatch):
    monkeypatch.setattr(lags, "SHORT", 0)
    subject = subject_of(*FOUND[label], full=False, device="cuda")
    assert all(figure <= bound for figure in errors(subject, subject.make, False, LONG, half, plain).values())


@pytest.mark.parametrize("label", [label for label in FOUND if label.startswith(("toeplitz", "dft"))])
@pytest.mark.parametrize("way", [plain, one_graph])
def test_long_rows_of_16_bits_by_products_of_smaller_matrices(label, way, monkeypatch):
    rows_are_long(monkeypatch)
    make, declared = FOUND[label]
    subject = subject_of(make, declared, full=False, device="cuda")
    figures = errors(subject, dict(declared.backends)["triton"], False, LONG, True, way)
    assert all(figure <= 3e-2 for figure in figures.values()), figures


@pytest.mark.parametrize(("cls", "verdict"), [(wrong.Aligned, "pass"), (wrong.DetachedWhenCompiled, "fail")])
def test_the_row_about_compilation_fails_a_mixer_that_it_changes(cls, verdict):
    rows = compiled(subject_of(cls, Declared(True, 2), full=False, device="cuda"))
    assert {row.verdict for row in rows} == {verdict}


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_and_neighbours_do_not_matter_on_the_device(backend):
    args = {"sam": True, "state": 16, "groups": 1, "separate": True}
    mixer = build("quasiseparable", args, True, backend=backend).cuda()
    segments = segments_of([[40, 90, 13]], 150)
    v, features, segments = on_gpu(*inputs(mixer, segments, torch.float32), segments)
    alone = mixer(v[:, 40:130], Features(*(x[:, 40:130] for x in features)), torch.ones_like(segments[:, 40:130]))
    torch.testing.assert_close(mixer(v, features, segments)[:, 40:130], alone, rtol=1e-2, atol=2e-2)

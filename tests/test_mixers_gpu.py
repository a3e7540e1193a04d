"""The battery of the mixers on a CUDA device: fast paths, both backends of the scan, bf16, compilation."""

import importlib.util

import pytest
import torch

from bench.mixers import toeplitz
from bench.mixers.base import Features
from tests.test_mixers import (
    CASES,
    HEADS,
    OPTIONS,
    WIDTH,
    build,
    by_matrix,
    gradients,
    inputs,
    label,
    rows,
    segments_of,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
KERNEL = pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is None, reason="mamba-ssm is not installed")
BACKENDS = ["torch", pytest.param("mamba_ssm", marks=KERNEL)]
LONG = 300


def on_gpu(v, features: Features, segments, dtype=None) -> tuple[torch.Tensor, Features, torch.Tensor]:
    return v.to("cuda", dtype), Features(*(x.to("cuda", dtype) for x in features)), segments.cuda()


def assert_near(mixer, exact, given, bound: float, autocast: bool) -> None:
    """Values and all gradients of `mixer` against the fp64 matrix: norm of the difference over the norm.

    The gradient of a parameter of a few entries is a sum over all tokens that may nearly cancel, so that its norm is
    taken as at least a twentieth of that of the values, a quarter if it has one entry a head.
    """

    def fast(*leaves):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            return mixer(*leaves)

    def slow(v, features, segments):
        return by_matrix(exact, v, features, segments)

    found = gradients(mixer, fast, *on_gpu(*given, torch.float32))
    expected = gradients(exact, slow, *on_gpu(*given))
    whole = float(expected["value"].norm())
    for key in expected:
        error, size = float((found[key].double() - expected[key]).norm()), float(expected[key].norm())
        least = (0.25 if expected[key].ndim == 1 else 0.05) * whole
        assert error <= bound * max(size, least), (key, error, size)


@pytest.mark.parametrize(("name", "args", "packed"), CASES, ids=label)
@pytest.mark.parametrize(("autocast", "bound"), [(False, 1e-4), (True, 3e-2)])
def test_forward_is_matrix_times_v(name, args, packed, autocast, bound):
    mixer, exact = (build(name, args, packed, length=LONG).cuda() for _ in range(2))
    segments = rows(packed, LONG)
    given = (*inputs(mixer, segments), segments)
    assert_near(mixer, exact.double(), given, bound, autocast)


@pytest.mark.parametrize("sam", [False, True])
@pytest.mark.parametrize(("autocast", "bound"), [(False, 1e-4), (True, 3e-2)])
def test_toeplitz_by_fourier_transforms(sam, autocast, bound, monkeypatch):
    monkeypatch.setattr(toeplitz, "SHORT", 0)
    mixer, exact = (build("toeplitz", {"sam": sam}, False, length=LONG).cuda() for _ in range(2))
    segments = rows(False, LONG)
    assert_near(mixer, exact.double(), (*inputs(mixer, segments), segments), bound, autocast)


@KERNEL
@pytest.mark.parametrize(("autocast", "bound"), [(False, 1e-2), (True, 3e-2)])  # the kernel multiplies fp32 as TF32
@pytest.mark.parametrize(("args", "packed"), [(a, p) for n, a, p in CASES if n == "quasiseparable"], ids=label)
def test_kernel_scan_is_matrix_times_v(args, packed, autocast, bound):
    args = args | {"state": 16}  # the least that its matrix products take
    mixer, exact = (
        build("quasiseparable", args, packed, length=LONG, backend=b).cuda() for b in ("mamba_ssm", "torch")
    )
    segments = rows(packed, LONG)
    given = (*inputs(mixer, segments), segments)
    assert_near(mixer, exact.double(), given, bound, autocast)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_and_neighbours_do_not_matter_on_the_device(backend):
    args = {"sam": True, "state": 16, "groups": 1, "separate": True}
    mixer = build("quasiseparable", args, True, backend=backend).cuda()
    segments = segments_of([[40, 90, 13]], 150)
    v, features, segments = on_gpu(*inputs(mixer, segments, torch.float32), segments)
    alone = mixer(v[:, 40:130], Features(*(x[:, 40:130] for x in features)), torch.ones_like(segments[:, 40:130]))
    torch.testing.assert_close(mixer(v, features, segments)[:, 40:130], alone, rtol=1e-2, atol=2e-2)


@pytest.mark.filterwarnings("ignore")  # the compiler's own: deprecated imports, complex numbers left to eager kernels
@pytest.mark.parametrize(("name", "args"), OPTIONS, ids=label)
def test_compiled_training_step_is_close_to_eager(name, args):
    mixer, segments = build(name, args, False, length=LONG).cuda(), rows(False, LONG)
    given = on_gpu(*inputs(mixer, segments, torch.float32), segments)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True)
    eager, fast = (gradients(mixer, way, *given) for way in (mixer.forward, compiled))
    for key in eager:
        error, size = (fast[key] - eager[key]).norm(), eager[key].norm()
        assert error <= 1e-3 * size + 1e-6, (key, float(error), float(size))
    assert fast["value"].shape == (len(segments), LONG, HEADS, WIDTH)

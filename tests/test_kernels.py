"""The Triton kernels in their interpreter, on any machine, and on a GPU: all gradients against plain torch, in fp32.

Axes as in bench/kernels.
"""

import ast
import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from bench import backbone, registry, train
from bench.check import subject_of
from bench.check.backends import HALF, errors, plain
from bench.check.verb import of
from bench.compose import ROOT, choices, make_run, make_where
from bench.mixers import dft, lags
from bench.mixers.base import Features
from bench.seeds import Streams
from tests.conftest import built, rows_are_long, setting, shrunk

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CLOSE = 1e-5
CLOSE_ON_GPU = 1e-4
CALLS = {
    "the shell": [
        ["convolution"],
        ["norm"],
        ["residual"],
        ["losses", False],
        ["vocabulary"],
        ["exact_features"],
        ["model", "quasiseparable", {}],
        ["model", "low_rank", {"mixer.sam": True}],
        ["model", "toeplitz", {"mixer.sam": True}],
    ],
    "low rank": [
        ["product"],
        ["mixer", "low_rank", {"rank": 4}],
        ["mixer", "low_rank", {"sam": True, "rank": 4, "feature_map": "elu1", "normalise": True}],
    ],
    "features, grids, tiles": [
        ["exponentials"],
        ["cosines", [3, 40], [20, 100], [40, 16]],
        ["differences"],
        ["mixer", "vandermonde", {"rank": 2, "bound": 0.5}],
        ["long"],
        ["long_mixer", "vandermonde", {"rank": 3, "bound": 0.5}],
        ["grid"],
        ["tiles"],
        ["mixer", "toeplitz", {"sam": True}],
    ],
    "attention": [
        ["attention"],
        ["mixer", "attention", {"sam": True, "rank": 4}],
        ["mixer", "attention", {"sam": False, "rank": 4}],
    ],
    "both directions": [["mixer", "quasiseparable", {"sam": True}], ["mixer", "add", {"sam": False, "heads": 2}]],
    "scans": [["scans", False]],
    "a state too large for the chip": [["mixer", "quasiseparable", {"sam": True, "state": 200}]],
    "groups": [["mixer", "quasiseparable", {"sam": True, "groups": 2}], ["mixer", "semiseparable", {}]],
    "products of scans": [["mixer", "mult", {"sam": True}], ["mixer", "mult", {"sam": False, "heads": 2}]],
    "decay": [["mixer", "decay_attention", {"normalise": True, "feature_map": "elu1"}], ["mixer", "dft", {}]],
}
# Backends that compute another matrix than `matrix`, near it by a stated tolerance.
NEAR = {
    "a sum of exponentials": [["mixer", "cauchy", {"rank": 3}]],
    "a grid": [
        ["mixer", "vandermonde", {"rank": 3}],
        ["cosines", [16, 1040]],
        ["model", "vandermonde", {"mixer.sam": True}],
    ],
    "a grid and frequencies between": [["long_mixer", "vandermonde", {"rank": 3}]],
}
NEAR_ENOUGH = 5e-4
NARROW = {"cosine_sums._cosines_back", "toeplitz._table"}
"""Read or write number by number: a token a thread, and a small table. Of others only a scale is so read."""
HALVES = [
    ["stream", "low_rank", {"mixer.sam": True}],
    ["stream", "vandermonde", {"mixer.sam": True}],
    ["stream", "identity", {"protocol.backbone.channel_mlp": 64}],
    ["scans", True],
    ["losses", True],
    ["half", "attention", {"sam": True, "rank": 4}],
    ["half", "quasiseparable", {"sam": True}],
    ["half", "toeplitz", {"sam": True}],
    ["half", "vandermonde", {"sam": True}],
]


def figures(calls, interpreted):
    """In a process of its own, since Triton reads the switch of its interpreter when it is imported."""
    env = os.environ | {"TRITON_INTERPRET": str(int(interpreted)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernel_cases", json.dumps(calls)]
    ended = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_a_kernel_is_plain_torch_in_values_and_all_gradients(calls):
    found = figures(calls, interpreted=True)
    assert found and all(figure < CLOSE for figure in found.values()), found


@pytest.mark.parametrize("calls", NEAR.values(), ids=NEAR)
def test_a_near_one_is_near(calls):
    found = figures(calls, interpreted=True)
    assert found and all(figure < NEAR_ENOUGH for figure in found.values()), found
    assert all((figure > CLOSE) != ("packed=True" in name or "model, " in name) for name, figure in found.items()), (
        found
    )


@pytest.mark.parametrize("call", HALVES, ids=[f"{what} {form}" for what, form, *_ in HALVES])
def test_in_bf16_a_kernel_is_as_near_as_check_asks(call):
    found = figures([call], interpreted=True)
    assert found and all(figure < HALF for figure in found.values()), found


@pytest.mark.parametrize(("name", "function"), [("toeplitz", "by_blocks"), ("dft", "real_part")])
def test_long_rows_of_16_bits_go_by_products_of_smaller_matrices(name, function, monkeypatch):
    """Which need no kernels; here at every level, with padding."""
    rows_are_long(monkeypatch)
    room, calls = {"by_blocks": lags, "real_part": dft}[function], []
    real = getattr(room, function)
    monkeypatch.setattr(room, function, lambda *given: calls.append(given) or real(*given))
    for make, declared in of(name, {}, make_where({"where.device": "cpu"})).values():
        subject, before = subject_of(make, declared, full=False, device="cpu"), len(calls)
        found = errors(subject, dict(declared.backends)["triton"], False, 300, True, plain)
        assert len(calls) > before and all(figure < HALF for figure in found.values()), found


SCANS = ("quasiseparable", "semiseparable", "add", "decay_attention")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", [*SCANS, "low_rank", "toeplitz", "attention", "mult", "vandermonde", "cauchy"])
def test_who_adds_v_as_it_goes_and_who_leaves_it_to_the_shell(name, packed):
    adds = name in SCANS or (not packed and name in ("low_rank", "toeplitz", "vandermonde"))
    for label, (make, declared) in of(name, {}, make_where({"where.device": "cpu"})).items():
        if "misaligned" in label or (name == "decay_attention" and "normalise=true" in label):
            continue
        subject = subject_of(make, declared, full=False, device="cpu")
        segments_BL = subject.documents([[64]], 64)
        v_BLHP, features = subject.inputs(subject.mixer(64, packed), segments_BL)
        features = Features(*(x.float().to("meta") for x in features))
        mixer = dict(declared.backends)["triton"](subject.grant(64, packed)).to("meta")
        given = v_BLHP.float().to("meta"), features, segments_BL.to("meta"), torch.ones((), device="meta")
        assert (mixer.with_skip(*given) is not None) == adds, label


def many_rows(name, rows, monkeypatch):
    """An operator's result for so many rows of one head, with a gradient."""
    from bench.kernels import cosine_sums, grid_product, scan, toeplitz

    length, table = 2 * scan.CHUNK + 1, {"requires_grad": True}
    v_BLHP = torch.zeros(rows, length, 1, 1, **table)
    if name == "cosines":
        return cosine_sums.cosine_sums(v_BLHP, 1, 1, torch.float32)
    if name == "a grid":
        return grid_product.grid_product(
            v_BLHP.new_zeros(1, 2, 1, length), v_BLHP[0, :, 0].detach(), v_BLHP, v_BLHP[..., 0, 0].detach(), None, 1, 1
        )
    if name == "toeplitz":
        return toeplitz.toeplitz(v_BLHP, torch.zeros(1, 1, 2 * length - 1, **table), torch.full((rows,), length))
    monkeypatch.setattr(scan, "SERIAL", scan.SERIAL if name == "scan" else 0)
    c_BLDGN, rate_BLDH = v_BLHP[:, :, None].detach(), torch.zeros(1, length, 2, 1, **table)
    kept_BL = torch.ones(v_BLHP.shape[:2], dtype=torch.int64)
    return scan.scan(v_BLHP, c_BLDGN, c_BLDGN, rate_BLDH, rate_BLDH, v_BLHP[..., 0], kept_BL, False)


@pytest.mark.parametrize("name", ["scan", "scan in steps", "toeplitz", "cosines", "a grid"])
def test_more_rows_and_heads_than_a_grid_has_beside_its_first_dimension(name, monkeypatch):
    """CUDA ends the others at 65,535."""
    from triton.runtime.jit import JITFunction

    grids, rows = [], 2**16
    monkeypatch.setattr(JITFunction, "run", lambda kernel, *words, grid, **options: grids.append(grid))
    y = many_rows(name, rows, monkeypatch)
    y.backward(y.detach())
    assert max(first for first, *_ in grids) >= rows and len(grids) > (1 if name == "cosines" else 4)
    assert all(size <= 65_535 for _, *others in grids for size in others)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("calls", "bound"),
    [*((c, CLOSE_ON_GPU) for c in CALLS.values()), *((c, NEAR_ENOUGH) for c in NEAR.values()), (HALVES, HALF)],
    ids=[*CALLS, *NEAR, "halves"],
)
def test_so_it_is_on_the_gpu(calls, bound):
    """Sums of fp32 in another order; nothing rounds to TF32 here."""
    found = figures(calls, interpreted=False)
    assert found and {name: figure for name, figure in found.items() if not figure < bound} == {}


@pytest.mark.parametrize(
    ("width", "state", "dtype", "fits"),
    [
        (64, 64, torch.bfloat16, True),
        (128, 192, torch.bfloat16, True),  # Table 2's SAM row
        (64, 1536, torch.bfloat16, False),  # and the one without
        (256, 256, torch.bfloat16, False),
        (64, 128, torch.float32, True),
        (128, 128, torch.float32, False),
    ],
)
def test_a_scan_goes_by_the_kernel_where_the_chip_has_room(width, state, dtype, fits):
    from bench.kernels.scan import takes

    assert takes(torch.empty(1, 2, 3, width, dtype=dtype), state) == fits


@pytest.mark.parametrize("name", [n for n in choices("mixer") if "triton" in registry.mixer_class(n).backends])
def test_a_mixer_of_kernels_has_plain_backends_that_need_none(name):
    """Gains are calibrated on the host whatever the training's backend: bit for bit what the plain mixer gives."""
    for make, declared in of(name, {}, make_where({"where.device": "cpu"})).values():
        subject = subject_of(make, declared, full=False, device="cpu")
        grant, segments_BL = subject.grant(12, False), subject.documents([[12]], 12)
        ways = make, dict(declared.backends)["triton"]
        unfused, fused = (subject.initialised(way(grant), torch.float32) for way in ways)
        v_BLHP, features = subject.inputs(unfused, segments_BL)
        given = v_BLHP.float(), type(features)(*(x.float() for x in features)), segments_BL
        with backbone.plain(fused):
            assert torch.equal(fused(*given), unfused(*given))


def kernels():
    """All of bench/kernels that no other calls, `file.name`: what is launched, however that is written."""
    found, called = set(), set()
    for file in (ROOT / "bench" / "kernels").glob("*.py"):
        functions = [x for x in ast.parse(file.read_text()).body if isinstance(x, ast.FunctionDef)]
        jitted = [x for x in functions if any("triton.jit" in ast.unparse(y) for y in x.decorator_list)]
        calls = [x.func for function in jitted for x in ast.walk(function) if isinstance(x, ast.Call)]
        found |= {(file.stem, x.name) for x in jitted}
        called |= {ast.unparse(x) for x in calls}
    return {f"{file}.{name}" for file, name in found if name not in called}


def compiled(*words):
    command = [sys.executable, "-W", "ignore", "benchmarks/compiled.py", *words]
    env = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    said = re.findall(r"(\w+\.\w+)(?: \w+=\w+)? +registers .* narrow +(\d+)", ended.stdout)
    assert {name for name, narrow in said if int(narrow) > 1} <= NARROW
    return {name for name, _ in said}


def test_every_kernel_compiles_for_an_h100_and_moves_memory_in_whole_pieces():
    """By Triton's own compiler, without a GPU: in bf16, as trainings are, and with each flag both ways; scans of one
    long chunk, of few and of large states as they are. `compiled` asks for the pieces."""
    one_form = "scan state 16,scan state 64 at 128,scan state 256"
    names = "convolution 1536,gated norm,residual,scan state 64 at 8192,toeplitz 128,attention 2048,low rank 1,"
    names += "exponential,exact,cosine,cross,grid,nonuniform"
    assert compiled("--flags", "--only", names) | compiled("--only", one_form) == kernels()


def test_with_one_head_a_kernel_compiles_too():
    """Triton takes an argument of 1 for a constant, which has no methods; its interpreter does not."""
    assert "grid_tiles.outer" in compiled("--heads", "1", "--only", "low rank 1,toeplitz 128,cosine,grid,exponential")


@pytest.mark.parametrize(
    ("backend", "device", "expected"), [("triton", "cuda", True), ("triton", "cpu", False), ("torch", "cuda", False)]
)
def test_a_loss_is_fused_with_the_backend_triton_on_a_gpu(backend, device, expected, tmp_path):
    run = shrunk(make_run("mini_mlm", "low_rank", {"mixer.heads": 2}, 0, 0))
    model, task = built(run, backend=backend)
    assert not task.fused
    how = dataclasses.replace(setting(tmp_path), device=device)
    train.Training(model, task, run.protocol, Streams(0, 0), how)
    assert task.fused is expected


PRODUCT = """\
        /*0160*/                   UMOV UR13, 0x400 ;                          /* 0x00000400000d7882 */
                                                                               /* 0x000fe20000000000 */
        /*1660*/                   S2UR UR4, SR_CgaCtaId ;                     /* 0x00000000000479c3 */
        /*1780*/                   ULEA UR13, UR4, UR13, 0x18 ;                /* 0x0000000d040d7291 */
        /*4450*/                   USHF.R.U32.HI UR8, URZ, 0x4, UR13 ;         /* 0x000000043f087899 */
        /*5ae0*/                   UMOV UR18, UR8 ;                            /* 0x0000000800127c82 */
        /*5c00*/               @P1 UMOV UR19, 0xc0000010 ;                     /* 0xc000001000137882 */
        /*5db0*/                   HGMMA.64x16x16.F32.BF16 R88, R40, gdesc[UR16].tnspB, R88 ;
"""


@pytest.mark.parametrize(
    ("last", "found"),
    [
        ("UIADD3 UR14, UP0, UR8, 0x20, URZ", []),
        ("UIADD3 UR14, UP0, UR12, 0x20, URZ", ["UR12 at 5dc0"]),  # as it was; then UR12 is told once
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT", ["UR16 at 5dc0", "UR17 at 5dc0"]),  # both factors
        ("UIADD3.64 UR20, UR18, 0x2, URZ", []),
        ("UIADD3.64 UR20, UR8, 0x2, URZ", ["UR9 at 5dc0"]),
        ("IMAD.WIDE R4, R107, UR8, RZ", []),  # factors have 32 bits
        ("IMAD.WIDE R4, R107, R8, UR8", ["UR9 at 5dc0"]),
        ("UIMAD.WIDE.U32 UR22, UR8, UR4, URZ", []),
        ("LDG.E R3, desc[UR18][R2.64]", []),
        ("LDG.E R3, desc[UR8][R2.64]", ["UR9 at 5dc0"]),
        ("STS.U16 [R105+UR14+0x4300], R14", ["UR14 at 5dc0"]),
    ],
)
def test_an_address_that_nothing_wrote_is_found_in_a_kernels_code(last, found):
    """The lines before are of a kernel that ptxas 12.8 got wrong, but for the @P1."""
    from benchmarks.machine_code import unwritten_in

    assert unwritten_in(f"{PRODUCT}        /*5dc0*/                   {last} ;\n" * 2) == found


def test_a_narrow_head_beside_a_large_state_is_multiplied_by_whole_instructions():
    """What ptxas 12.8 gets wrong otherwise."""
    from bench.kernels.scan import _padded

    assert _padded(5, 64) == (64, 64) and _padded(16, 200) == (64, 256)
    assert _padded(5, 16) == (16, 16) and _padded(100, 33) == (128, 64)


def test_a_case_that_there_is_not_is_refused_with_those_there_are():
    command = [sys.executable, "-W", "ignore", "benchmarks/compiled.py", "--only", "scan,skan"]
    ended = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "0"}, cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 2 and "no case begins with 'skan'; there are: convolution 1536," in ended.stderr

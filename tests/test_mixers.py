"""One battery that every mixer passes, then what is special for each.

`forward` is held to `matrix @ v` in fp64, values and gradients. A case is (name, args, packed); shapes are small, but
longer than a chunk of the scan. Axes as in `bench.mixers.base`.
"""

import dataclasses
import importlib
import math
from pathlib import Path

import pytest
import torch
import yaml

from bench import Refusal
from bench.compose import shipped
from bench.mixers import lags
from bench.mixers.base import Features, Grant, Mixer, Wants
from bench.registry import mixer_class

CLASSES = {name: mixer_class(name) for name in shipped("mixer")}
CONFIGS = Path(__file__).parent.parent / "configs" / "mixer"
HEADS, WIDTH, LENGTH = 2, 3, 150  # three chunks of the scan, the last one not full
OPTIONS = [
    ("identity", {"sam": False}),
    ("dense", {"sam": False}),
    ("dft", {"sam": False}),
    ("monarch", {"sam": False}),
    ("fourier", {"sam": False}),
    ("s4", {"sam": False, "state": 4}),
    *(
        (
            "hyena",
            {"sam": sam, "span": 128, "bands": 2, "hidden": 8, "inner": 2, "frequency": 10.0, "bidirectional": both},
        )
        for sam in (False, True)
        for both in (True, False)
    ),
    *(("toeplitz", {"sam": sam}) for sam in (False, True)),
    *(
        ("low_rank", {"sam": sam, "rank": 4, "feature_map": phi, "normalise": norm})
        for sam in (False, True)
        for phi, norm in (("silu", False), ("elu1", False), ("elu1", True), ("none", False))
    ),
    *(("attention", {"sam": sam, "rank": 4}) for sam in (False, True)),
    *(("cauchy", {"sam": sam, "rank": 4, "bound": 4.0}) for sam in (False, True)),
    *(("vandermonde", {"sam": sam, "rank": 4, "bound": 0.5}) for sam in (False, True)),
    *(
        ("quasiseparable", {"sam": sam, "state": 4, "groups": groups, "separate": separate})
        for sam in (False, True)
        for groups, separate in ((1, True), (2, False))
    ),
    *(
        ("add", {"sam": sam, "state": 4, "groups": groups, "separate": separate, "shift": shift, "diagonal": diagonal})
        for sam in (False, True)
        for groups, separate, shift, diagonal in (
            (1, True, False, False),
            (2, False, True, False),
            (1, True, False, True),
            (2, True, True, True),
        )
    ),
    *(
        ("mult", {"sam": sam, "state": 4, "groups": groups, "separate": separate})
        for sam in (False, True)
        for groups, separate in ((1, True), (2, False))
    ),
    *(("semiseparable", {"sam": sam, "state": 4, "groups": groups}) for sam in (False, True) for groups in (1, 2)),
    *(
        ("decay_attention", {"sam": True, "rank": 4, "decay": decay, "feature_map": phi, "normalise": norm})
        for decay in ("fixed", "selective")
        for phi, norm in (("silu", False), ("elu1", True))
    ),
]
CASES = [(name, args, packed) for name, args in OPTIONS for packed in (False, True)]


def label(value) -> str:
    if isinstance(value, dict):
        return "-".join(f"{key}={value[key]}" for key in value)
    return str(value)


def build(name: str, args: dict, packed: bool, length: int = LENGTH, seed: int = 0, backend: str = "torch") -> Mixer:
    """A mixer of 2 heads of width 3 with every parameter initialised, fp32."""
    cls = CLASSES[name]
    mixer = cls(Grant(HEADS, WIDTH, length, packed), cls.Args(heads=HEADS, **args), backend)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in mixer.named_parameters():
            value = mixer.initial(key, generator)
            assert value.dtype == torch.float32 and value.shape == parameter.shape
            parameter.copy_(value)
    return mixer


def segments_of(rows: list[list[int]], length: int) -> torch.Tensor:
    """Rows given as lengths of documents; padding fills up."""
    out_BL = torch.zeros(len(rows), length, dtype=torch.int64)
    for b, row in enumerate(rows):
        filled = torch.repeat_interleave(torch.arange(1, len(row) + 1), torch.tensor(row, dtype=torch.int64))
        out_BL[b, : len(filled)] = filled
    return out_BL


def rows(packed: bool, length: int) -> torch.Tensor:
    """A full row, a padded row, an empty row; packed: borders on, beside and across those of the scan's chunks."""
    if packed:
        half = length // 2
        return segments_of([[half - 11, 1, 2, length - half - 2], [64, 64], [], [1, length - 2, 1]], length)
    return segments_of([[length], [length // 2 + 3], [], [1]], length)


def inputs(mixer: Mixer, segments_BL, dtype=torch.float64, seed: int = 1) -> tuple[torch.Tensor, Features]:
    generator = torch.Generator().manual_seed(seed)
    batch, length = segments_BL.shape
    wants = mixer.wants
    shapes = [(HEADS, WIDTH), (wants.conv,), (wants.raw,), (wants.exact,)]
    v, *kinds = (torch.randn(batch, length, *s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return v, Features(*kinds)


def apply(m_BHLL: torch.Tensor, v_BLHP: torch.Tensor) -> torch.Tensor:
    return torch.einsum("bhij,bjhp->bihp", m_BHLL, v_BLHP)


def by_matrix(mixer, v, features, segments):
    """M v, or the entrywise product of the M v of all factors."""
    return math.prod(apply(m, v) for m in mixer.matrices(v, features, segments))


def factors(mixer, v, features, segments):
    """M, or all factors one after another, as if they were heads."""
    return torch.cat(mixer.matrices(v, features, segments), 1)


def gradients(mixer: Mixer, way, v, features: Features, segments) -> dict[str, torch.Tensor]:
    """The value and the gradients of a fixed random projection of it, by name."""
    leaves = {"v": v, "conv": features.conv_BLK, "raw": features.raw_BLK, "exact": features.exact_BLK}
    leaves = {key: x.detach().clone().requires_grad_() for key, x in leaves.items()}
    y = way(leaves["v"], Features(leaves["conv"], leaves["raw"], leaves["exact"]), segments)
    probe = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y)
    leaves |= dict(mixer.named_parameters())
    found = torch.autograd.grad((y * probe).sum(), list(leaves.values()), allow_unused=True)
    grads = {key: torch.zeros_like(x) if g is None else g for (key, x), g in zip(leaves.items(), found, strict=True)}
    return {"value": y.detach(), **grads}


def assert_equal_ways(mixer: Mixer, v, features, segments, tolerance: float) -> None:
    """Largest difference, relative to the largest entry (to 0.01 where that is smaller, for what is zero by theory)."""
    fast = gradients(mixer, mixer.forward, v, features, segments)
    slow = gradients(mixer, lambda *given: by_matrix(mixer, *given), v, features, segments)
    for key in fast:
        if slow[key].numel():
            size, error = float(slow[key].abs().amax()), float((fast[key] - slow[key]).abs().amax())
            assert error <= tolerance * max(size, 1e-2), (key, error, size)


# The battery.


def test_the_battery_covers_every_mixer_level_and_form_that_ships():
    shipped = {(name, level) for name, cls in CLASSES.items() for level in cls.levels}
    assert {(name, args["sam"]) for name, args in OPTIONS} == shipped
    for name, level in shipped:
        values, varied = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()), set().union(*CLASSES[name].forms)
        for form in CLASSES[name].forms:
            whole = {key: values[key] for key in varied} | form | {"sam": level}
            assert any(name == other and whole.items() <= args.items() for other, args in OPTIONS), (name, level, form)


@pytest.mark.parametrize(("name", "args", "packed"), CASES, ids=label)
def test_forward_is_matrix_times_v_with_all_gradients(name, args, packed):
    mixer = build(name, args, packed).double()
    for length in (1, 37, LENGTH):
        segments = rows(packed, length) if length == LENGTH else segments_of([[length], [], [length // 2]], length)
        assert_equal_ways(mixer, *inputs(mixer, segments), segments, 1e-11)


@pytest.mark.parametrize(("name", "args", "packed"), CASES, ids=label)
def test_fp32_is_close_and_bf16_autocast_is_finite_and_close(name, args, packed):
    mixer, segments = build(name, args, packed), rows(packed, LENGTH)
    v, features = inputs(mixer, segments, torch.float32)
    exact = by_matrix(build(name, args, packed).double(), *inputs(mixer, segments), segments)
    with torch.no_grad():
        plain = mixer(v, features, segments)
        matrix = by_matrix(mixer, v, features, segments)
        with torch.autocast("cpu", torch.bfloat16):
            half = mixer(v, features, segments)
            low = Features(features.conv_BLK.bfloat16(), features.raw_BLK.bfloat16(), features.exact_BLK)
            whole = mixer(v.bfloat16(), low, segments)
    assert plain.dtype == matrix.dtype == torch.float32
    size = exact.norm()
    assert (plain - exact).norm() < 1e-5 * size and (matrix - exact).norm() < 1e-5 * size
    for y in (half, whole):
        assert (y - exact).norm() < 2e-2 * size  # also fails on NaN


@pytest.mark.parametrize(("name", "args", "packed"), CASES, ids=label)
def test_no_token_sees_padding_or_another_document(name, args, packed):
    mixer, segments = build(name, args, packed).double(), rows(packed, LENGTH)
    v, features = inputs(mixer, segments)
    other_v, other = inputs(mixer, segments, seed=7)
    y, m = mixer(v, features, segments), factors(mixer, v, features, segments)
    different = segments[:, None, :, None] != segments[:, None, None, :]
    padding = segments == 0
    assert (m.masked_select(different | padding[:, None, None] | padding[:, None, :, None]) == 0).all()
    assert (y[padding] == 0).all()
    for b, number in ((0, 1), (1, 1), *(((0, 4), (3, 2)) if packed else ())):
        kept = segments[b] == number
        mixed_v = torch.where(kept[None, :, None, None], v, 10 * other_v)
        mixed = Features(*(torch.where(kept[None, :, None], x, 10 * o) for x, o in zip(features, other, strict=True)))
        # A document's result does not depend on its neighbours, on what stands on padding, or on other rows.
        torch.testing.assert_close(mixer(mixed_v, mixed, segments)[b, kept], y[b, kept], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "args", "packed"), CASES, ids=label)
def test_amount_of_padding_and_of_company_do_not_matter(name, args, packed):
    mixer, n = build(name, args, packed).double(), 70
    segments = segments_of([[40, 30] if packed else [n]], n)
    v, features = inputs(mixer, segments)
    alone = mixer(v, features, segments)
    longer = torch.cat([torch.nn.functional.pad(segments, (0, LENGTH - n)), rows(packed, LENGTH)])
    v_long, features_long = inputs(mixer, longer, seed=5)
    for long, short in ((v_long, v), *zip(features_long, features, strict=True)):
        long[0, :n] = short[0]
    torch.testing.assert_close(mixer(v_long, features_long, longer)[0, :n], alone[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "args"), OPTIONS, ids=label)
def test_lengths(name, args):
    short, long = (segments_of([[n]], n) for n in (LENGTH, LENGTH + 50))
    mixer = build(name, args, False).double()
    if args["sam"]:
        # A longer row, and the same values for whichever length was granted.
        v, features = inputs(mixer, long)
        granted = build(name, args, False, length=LENGTH + 50).double()
        torch.testing.assert_close(mixer(v, features, long), by_matrix(granted, v, features, long))
        return
    v, features = inputs(mixer, long)
    for way in (mixer.forward, lambda *given: factors(mixer, *given)):
        with pytest.raises(ValueError, match=f"{name} has parameters for {LENGTH} tokens, given {LENGTH + 50}"):
            way(v, features, long)
    v, features = inputs(mixer, short)
    whole, part = (
        factors(mixer, v[:, :n], Features(*(x[:, :n] for x in features)), short[:, :n]) for n in (LENGTH, 64)
    )
    block = whole[..., :64, :64]
    if name == "attention" or args.get("normalise"):
        block = block / block.sum(-1, keepdim=True)  # rows sum to one at every length
    torch.testing.assert_close(part, block, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "args"), [case for case in OPTIONS if not case[1]["sam"]], ids=label)
def test_data_independent_matrices_ignore_the_data(name, args):
    mixer, segments = build(name, args, True).double(), rows(True, LENGTH)
    assert mixer.wants == Wants(conv=0, raw=0, exact=0)
    first, second = (factors(mixer, *inputs(mixer, segments, seed=seed), segments) for seed in (1, 2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(("name", "args"), OPTIONS, ids=label)
def test_everything_is_alive_at_initialisation(name, args):
    mixer, segments = build(name, args, False).double(), segments_of([[LENGTH], [LENGTH]], LENGTH)
    v, features = inputs(mixer, segments)
    grads = gradients(mixer, mixer.forward, v, features, segments)
    for key, grad in grads.items():
        if key in ("conv", "raw", "exact"):
            assert (grad.abs().amax((0, 1)) > 0).all(), key
        else:
            assert (grad != 0).double().mean() > 0.9, key  # the first token's forward c and the like are read by nobody
    m = factors(mixer, v, features, segments)
    off = m - torch.diag_embed(m.diagonal(dim1=2, dim2=3))
    assert (off.norm() == 0) if name == "identity" else (off.norm(dim=(2, 3)) > 0.02 * m.norm(dim=(2, 3))).all()


@pytest.mark.parametrize(("name", "args"), OPTIONS, ids=label)
def test_builds_on_meta_draws_from_its_generator_and_states_its_cost(name, args):
    cls = CLASSES[name]
    with torch.device("meta"):
        abstract = cls(Grant(HEADS, WIDTH, LENGTH, False), cls.Args(heads=HEADS, **args), "torch")
        names = [key for key, _ in abstract.named_parameters()]
        values = [(key, abstract.initial(key, torch.Generator("cpu").manual_seed(3))) for key in names]
    assert not list(abstract.buffers())
    state = torch.get_rng_state()
    for key, value in values:
        assert value.device.type == "cpu"
        assert torch.equal(value, abstract.initial(key, torch.Generator().manual_seed(3)))
    assert torch.equal(state, torch.get_rng_state())
    assert abstract.flops(LENGTH) >= 0 and isinstance(abstract.flops(LENGTH), int)
    assert (abstract.flops(2 * LENGTH) > abstract.flops(LENGTH)) == (name != "identity")


# The compiler's own, on a mixer with a hand-written backward pass.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(
    ("name", "args", "packed"), [c for c in CASES if c[1].get("feature_map", "silu") == "silu"], ids=label
)
def test_compiles_without_a_graph_break(name, args, packed):
    mixer, segments = build(name, args, packed), rows(packed, LENGTH)
    v, features = inputs(mixer, segments, torch.float32)
    torch._dynamo.reset()  # else the many forms of one class count as recompilations, which are limited
    compiled = torch.compile(mixer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(v, features, segments), mixer(v, features, segments))


@pytest.mark.parametrize("name", CLASSES)
def test_yaml_is_total_and_args_have_no_defaults(name):
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    module = importlib.import_module(f"bench.mixers.{values.pop('name')}")
    fields = dataclasses.fields(module.Args)
    assert [f.name for f in fields] == list(values) and all(f.default is dataclasses.MISSING for f in fields)
    args = module.Args(**values)
    mixer = CLASSES[name](Grant(args.heads, 8, 16, False), args, CLASSES[name].backends[0])
    assert values["sam"] in mixer.levels and CLASSES[name].Args is module.Args
    assert (sum(mixer.wants.__dict__.values()) > 0) == values["sam"]
    assert args.heads in mixer.heads_allowed(32) and 5 not in mixer.heads_allowed(32)


REFUSED = [
    ("toeplitz", {"heads": -1}, "heads is -1"),
    ("low_rank", {"rank": 0}, "rank is 0"),
    ("low_rank", {"feature_map": "relu"}, "feature_map is relu; allowed: silu, elu1, none"),
    ("low_rank", {"normalise": True}, "normalise with feature_map silu; allowed: elu1"),
    ("attention", {"rank": 0}, "rank is 0"),
    ("cauchy", {"rank": 0}, "rank is 0"),
    ("cauchy", {"bound": 0.0}, "bound is 0.0; allowed: above 0, at most 20"),
    ("vandermonde", {"rank": 0}, "rank is 0"),
    ("vandermonde", {"bound": 0.6}, "bound is 0.6; allowed: above 0, at most 0.5"),
    ("quasiseparable", {"state": 0}, "state is 0"),
    ("quasiseparable", {"groups": 3}, "groups is 3; allowed with 4 heads: 1, 2, 4"),
    ("decay_attention", {"sam": False}, "allowed: true"),
    ("decay_attention", {"rank": 0}, "rank is 0"),
    ("decay_attention", {"decay": "none"}, "decay is none; allowed: fixed, selective"),
    ("decay_attention", {"feature_map": "relu"}, "feature_map is relu; allowed: silu, elu1, none"),
    ("decay_attention", {"normalise": True}, "normalise with feature_map silu; allowed: elu1"),
    ("add", {"state": 0}, "mixer add: state is 0"),
    ("add", {"groups": 3}, "mixer add: groups is 3; allowed with 4 heads: 1, 2, 4"),
    ("mult", {"state": 0}, "mixer mult: state is 0"),
    ("mult", {"groups": 3}, "mixer mult: groups is 3; allowed with 4 heads: 1, 2, 4"),
    ("semiseparable", {"state": 0}, "state is 0"),
    ("semiseparable", {"groups": 3}, "groups is 3; allowed with 4 heads: 1, 2, 4"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED, ids=label)
def test_impossible_arguments_are_refused(name, change, message):
    values = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    del values["name"]
    with pytest.raises(Refusal, match=message):
        CLASSES[name].Args(**values | change)


# What is special.


def full(name: str, args: dict, length: int = LENGTH) -> tuple[Mixer, torch.Tensor, Features, torch.Tensor]:
    mixer, segments = build(name, args, False, length=length).double(), segments_of([[length]], length)
    return (mixer, *inputs(mixer, segments), segments)


def rank(m: torch.Tensor) -> int:
    return int(torch.linalg.matrix_rank(m, rtol=1e-9).max())


def test_identity_returns_v_on_real_tokens():
    mixer, segments = build("identity", {"sam": False}, True), rows(True, LENGTH)
    v, features = inputs(mixer, segments, torch.float32)
    assert torch.equal(mixer(v, features, segments)[segments > 0], v[segments > 0])


@pytest.mark.parametrize("sam", [False, True])
def test_toeplitz_has_constant_diagonals_and_its_own_token_at_lag_zero(sam):
    mixer, v, features, segments = full("toeplitz", {"sam": sam})
    m = mixer.matrix(v, features, segments)
    assert torch.equal(m[..., 1:, 1:], m[..., :-1, :-1])
    if sam:
        w = torch.nn.functional.silu(features.conv_BLK[0]) / LENGTH**0.5
        lags = {0: w[0, :HEADS], 5: w[5, :HEADS], -5: w[5, HEADS:]}
    else:
        lags = {lag: mixer.t_HK[:, LENGTH - 1 + lag] for lag in (0, 5, -5)}
    for lag, expected in lags.items():
        torch.testing.assert_close(m[0, :, 20 + lag, 20], expected)


def test_toeplitz_weights_come_from_the_offset_inside_the_document():
    mixer, length = build("toeplitz", {"sam": True}, True).double(), 40
    two, one = segments_of([[23, 17]], length), segments_of([[17]], 17)
    v, features = inputs(mixer, two)
    second = mixer(v, features, two)[:, 23:]
    torch.testing.assert_close(second, mixer(v[:, 23:], Features(*(x[:, 23:] for x in features)), one))


LONG = [(name, args) for name, args in OPTIONS if name in ("toeplitz", "s4", "hyena")]


@pytest.mark.parametrize(("name", "args"), LONG, ids=label)
@pytest.mark.parametrize("length", [1, 2, 129, 300])
def test_long_convolutions_by_fourier_transforms(name, args, length, monkeypatch):
    monkeypatch.setattr(lags, "SHORT", 0)
    mixer = build(name, args, False, length=310).double()
    segments = segments_of([[length], [length // 2], []], length)
    assert_equal_ways(mixer, *inputs(mixer, segments), segments, 1e-11)
    with torch.autocast("cpu", torch.bfloat16):
        v, features = inputs(mixer, segments, torch.bfloat16)
        assert mixer.float()(v, features, segments).dtype == torch.bfloat16


@pytest.mark.parametrize("phi", ["silu", "elu1", "none"])
@pytest.mark.parametrize("sam", [False, True])
def test_low_rank_has_its_rank_and_scale(sam, phi):
    mixer, v, features, segments = full("low_rank", {"sam": sam, "rank": 4, "feature_map": phi, "normalise": False})
    m = mixer.matrix(v, features, segments)
    assert rank(m) == 4 == mixer.state_size // WIDTH
    q, k = mixer.mapped(features, LENGTH)
    torch.testing.assert_close(m[0, 1, 9, 30], (q[0, 9, 1] * k[0, 30, 1]).sum() / (LENGTH * 4) ** 0.5)


@pytest.mark.parametrize("sam", [False, True])
@pytest.mark.parametrize(("name", "own"), [("attention", {}), ("low_rank", {"feature_map": "elu1", "normalise": True})])
def test_normalised_rows_are_positive_and_sum_to_one(name, own, sam):
    mixer, segments = build(name, {"sam": sam, "rank": 4, **own}, True).double(), rows(True, LENGTH)
    m = mixer.matrix(*inputs(mixer, segments), segments)
    assert (m >= 0).all()
    torch.testing.assert_close(m.sum(-1), (segments > 0).double()[:, None].expand(-1, HEADS, -1))


def test_attention_survives_logits_that_overflow_exp():
    mixer, v, features, segments = full("attention", {"sam": True, "rank": 4})
    segments[:, 40:] = 0
    big = features._replace(conv_BLK=100 * features.conv_BLK)
    assert_equal_ways(mixer, v, big, segments, 1e-11)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("sam", [False, True])
def test_quasiseparable_blocks_off_the_diagonal_have_rank_at_most_the_state(sam, separate):
    mixer, v, features, segments = full("quasiseparable", {"sam": sam, "state": 4, "groups": 1, "separate": separate})
    m = mixer.matrix(v, features, segments)
    for cut in (1, 40, 64, 149):
        below, above = m[..., cut:, :cut], m[..., :cut, cut:]
        assert rank(below) == rank(above) == min(4, cut, LENGTH - cut)
    assert rank(m[..., 30:60, 30:60]) > 8  # the diagonal is free: no sum of two rank-4 halves
    delta = m.diagonal(dim1=2, dim2=3)[0].T
    free = features.conv_BLK[0, :, -HEADS:] if sam else mixer.delta_LH
    torch.testing.assert_close(delta, free + mixer.D_H)
    assert mixer.state_size == 4 * WIDTH


def test_quasiseparable_entries_are_those_of_equation_3():
    mixer, v, features, segments = full("quasiseparable", {"sam": True, "state": 4, "groups": 2, "separate": True})
    m = mixer.matrix(v, features, segments)[0]
    cb = torch.nn.functional.silu(features.conv_BLK[0, :, :-HEADS]).view(LENGTH, 2, 2, 2, 4)  # D, c or b, G, N
    dt = torch.nn.functional.softplus(features.raw_BLK[0] + mixer.dt_bias_2H).view(LENGTH, 2, HEADS)
    A = torch.exp(-dt * mixer.A_log_H.exp())
    i, j, h = 20, 17, 1
    forward = (cb[i, 0, 0, h] * cb[j, 0, 1, h]).sum() * A[20, 0, h] * A[19, 0, h] * A[18, 0, h] * dt[j, 0, h]
    backward = (cb[j, 1, 0, h] * cb[i, 1, 1, h]).sum() * A[17, 1, h] * A[18, 1, h] * A[19, 1, h] * dt[i, 1, h]
    torch.testing.assert_close(torch.stack([m[h, i, j], m[h, j, i]]), torch.stack([forward, backward]))


def test_quasiseparable_survives_decays_that_underflow():
    mixer, v, features, segments = full("quasiseparable", {"sam": True, "state": 4, "groups": 1, "separate": True})
    fast = features._replace(raw_BLK=300 * features.raw_BLK)
    assert_equal_ways(mixer, v, fast, segments, 1e-9)  # differences of sums near -1e4


def test_quasiseparable_starts_with_the_published_step_sizes():
    mixer = build("quasiseparable", {"sam": True, "state": 4, "groups": 1, "separate": True}, False)
    dt = torch.nn.functional.softplus(mixer.dt_bias_2H)
    assert (dt > 0.99e-3).all() and (dt < 0.101).all() and len(dt.unique()) == 2 * HEADS


def test_mamba_backend_is_refused_where_it_cannot_run():
    args = {"sam": True, "state": 4, "groups": 1, "separate": True}
    with pytest.raises(ValueError, match="has no backend 'cuda'; it has: torch, triton, mamba_ssm"):
        build("quasiseparable", args, False, backend="cuda")
    mixer, v, features, segments = full("quasiseparable", args)
    mixer.backend = "mamba_ssm"
    with pytest.raises(Refusal, match="needs a CUDA device; on cpu use: torch"):
        mixer(v, features, segments)
    if importlib.util.find_spec("mamba_ssm") is None:
        with pytest.raises(Refusal, match=r"mixerbench\[mamba\]"):
            build("quasiseparable", args, False, backend="mamba_ssm")

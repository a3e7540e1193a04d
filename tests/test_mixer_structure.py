"""What the class of each mixer promises, beyond the battery: closed forms and structure of its matrix."""

import math

import pytest
import torch

from bench.mixers import lags, waves
from bench.mixers import vandermonde as vandermonde_room
from bench.mixers.base import Features
from tests.test_mixers import HEADS, LENGTH, WIDTH, assert_equal_ways, build, full, gradients, inputs, rank, rows


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
    assert 0.9 < float(mixer(v, features, segments).detach().norm() / v.norm()) < 1.1


def test_dft_places_are_exact_in_fp32_at_long_rows():
    mixer = build("dft", {"sam": False}, True, length=2048)
    v = torch.zeros(1, 2048, HEADS, WIDTH)
    row = torch.arange(2048, dtype=torch.float64) * 2047 % 2048
    expected = math.sqrt(2 / 2048) * torch.cos(2 * math.pi * row / 2048)
    torch.testing.assert_close(mixer.cosines(2048, v)[2047].double(), expected, rtol=0, atol=5e-8)


# Long rows by products of smaller matrices ---------------------------------------------------------------------------


def assert_same_values_and_gradients(found, expected, leaves):
    """Within 1e-13 of their size, in fp64."""
    g = torch.randn_like(expected)
    pairs = zip(torch.autograd.grad(found, leaves, g), torch.autograd.grad(expected, leaves, g), strict=True)
    for one, other in [(found.detach(), expected.detach()), *pairs]:
        assert float((one - other).norm() / other.norm()) < 1e-13


@pytest.mark.parametrize(("n", "length"), [(2, 2), (12, 12), (64, 64), (128, 100), (200, 200), (2048, 2048)])
def test_the_real_part_of_a_transform_is_two_products(n, length):
    v = torch.randn(2, length, 3, 2, dtype=torch.float64, requires_grad=True)
    m = torch.cos(2 * math.pi * waves.turns(length, n, v))
    assert_same_values_and_gradients(waves.real_part(v, n), torch.einsum("ij,bjhp->bihp", m, v), (v,))


def test_stretches_are_even_near_the_root_and_none_where_a_factor_would_be_large():
    assert [waves.stretches(n) for n in (8192, 131_072, 3000, 4096)] == [64, 256, 50, 64]
    assert waves.stretches(4099) is waves.stretches(2**21) is None


@pytest.mark.parametrize(("length", "filters"), [(64, 2), (200, 1), (200, 2), (257, 2), (1000, 1)])
def test_constant_diagonals_by_blocks_are_the_matrix(length, filters, monkeypatch):
    w = torch.randn(filters, 3, 2 * length - 1, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, length, 3, 4, dtype=torch.float64, requires_grad=True)
    assert_same_values_and_gradients(lags.by_blocks(w, v), lags.apply(lags.spread(w), v), (w, v))
    monkeypatch.setattr(lags, "LONG", 0)  # blocks of twice as many places
    assert_same_values_and_gradients(lags.by_blocks(w, v), lags.apply(lags.spread(w), v), (w, v))


@pytest.mark.parametrize("way", ["toeplitz", "dft"])
def test_long_rows_of_16_bits_are_as_near_as_the_matrix_in_16_bits(way):
    """What transforms of rounded numbers add stays within twice the error of a plain product of them."""
    v = torch.randn(2, 2048, 2, 64).abs()
    if way == "toeplitz":
        w = torch.randn(2, 2, 4095)
        exact = lags.convolve(w.double(), v.double())
        found, plain = lags.product(w, v.bfloat16(), None, False), lags.apply(lags.spread(w), v.bfloat16())
    else:
        m = torch.cos(2 * math.pi * waves.turns(2048, 2048, v.double()))
        exact = torch.einsum("ij,bjhp->bihp", m, v.double())
        found = waves.real_part(v.bfloat16(), 2048)
        plain = torch.einsum("ij,bjhp->bihp", m.bfloat16(), v.bfloat16())
    errors = [float((x.double() - exact).norm() / exact.norm()) for x in (found, plain)]
    assert 1e-4 < errors[0] < 2 * errors[1] < 0.02


@pytest.mark.parametrize("sam", [False, True])
def test_cauchy_of_one_term_has_displacement_rank_one_and_positive_entries(sam):
    mixer, v, features, segments = full("cauchy", {"sam": sam, "rank": 1, "bound": 4.0})
    m = mixer.matrix(v, features, segments)
    a, b = (x[..., 0] for x in mixer.nodes(features, LENGTH))
    displaced = a[..., :, None] * m + m * b[..., None, :]
    torch.testing.assert_close(displaced, torch.full_like(m, 2 / LENGTH**0.5))
    assert (m > 0).all() and rank(m) > 5


@pytest.mark.parametrize("sam", [False, True])
def test_cauchy_entries_vary_at_the_start_with_features_as_small_as_the_shell_makes_them(sam):
    mixer, v, features, segments = full("cauchy", {"sam": sam, "rank": 16, "bound": 4.0})
    m = mixer.matrix(v, features._replace(conv_BLK=0.3 * features.conv_BLK), segments)
    assert (m.std((2, 3)) > 0.15 * m.mean((2, 3))).all()  # published: 0.011


def test_cauchy_has_no_pole_and_no_dead_gradient_beyond_the_clamp():
    mixer, v, features, segments = full("cauchy", {"sam": True, "rank": 4, "bound": 4.0})
    assert_equal_ways(mixer, v, features._replace(conv_BLK=1e3 * features.conv_BLK), segments, 1e-11)
    m = mixer.matrix(v, features._replace(conv_BLK=1e3 * features.conv_BLK), segments) * LENGTH**0.5
    assert (m < math.exp(4.0001)).all() and (m > math.exp(-4.0001)).all()
    large = features._replace(conv_BLK=torch.full_like(features.conv_BLK, 3.0).requires_grad_())
    mixer(v, large, segments).sum().backward()
    assert (large.conv_BLK.grad.abs().amax((0, 1)) > 0).all()  # g q is three times the bound


def test_cauchy_keeps_no_matrix_for_each_term():
    mixer, v, features, segments = full("cauchy", {"sam": True, "rank": 16, "bound": 4.0})
    leaf, kept = features._replace(conv_BLK=features.conv_BLK.requires_grad_()), {}

    def keep(x):
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = mixer(v, leaf, segments)
    y.sum().backward()
    assert sum(kept.values()) < 3 * HEADS * LENGTH**2


@pytest.mark.parametrize("sam", [False, True])
def test_semiseparable_is_lower_triangular_with_blocks_of_rank_at_most_the_state(sam):
    mixer, v, features, segments = full("semiseparable", {"sam": sam, "state": 4, "groups": 1})
    m = mixer.matrix(v, features, segments)
    assert (m.triu(1) == 0).all() and (m.diagonal(dim1=2, dim2=3) != 0).all()
    for cut in (1, 40, 64, 149):
        block = m[..., cut:, : cut + 1]  # holds an entry of the diagonal: that one is not free
        assert rank(block) == min(4, cut + 1, LENGTH - cut)
    assert mixer.state_size == 4 * WIDTH


def test_semiseparable_is_the_recurrence_it_is_named_after():
    mixer, v, features, segments = full("semiseparable", {"sam": True, "state": 4, "groups": 2})
    cb = torch.nn.functional.silu(features.conv_BLK[0]).view(LENGTH, 2, HEADS, 4)
    dt = torch.nn.functional.softplus(features.raw_BLK[0] + mixer.dt_bias_H)
    A = torch.exp(-dt * mixer.A_log_H.exp())
    state, y = torch.zeros(HEADS, 4, WIDTH, dtype=torch.float64), []
    for i in range(LENGTH):
        state = A[i, :, None, None] * state + dt[i, :, None, None] * cb[i, 1, :, :, None] * v[0, i, :, None]
        y.append(torch.einsum("hn,hnp->hp", cb[i, 0], state))
    torch.testing.assert_close(mixer(v, features, segments)[0], torch.stack(y))


def test_semiseparable_survives_decays_that_underflow():
    mixer, v, features, segments = full("semiseparable", {"sam": True, "state": 4, "groups": 1})
    assert_equal_ways(mixer, v, features._replace(raw_BLK=300 * features.raw_BLK), segments, 1e-9)


def added(sam: bool, shift: bool, diagonal: bool, groups: int = 1):
    own = {"sam": sam, "state": 4, "groups": groups, "separate": True, "shift": shift, "diagonal": diagonal}
    return full("add", own)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("sam", [False, True])
def test_add_with_shift_and_diagonal_is_the_quasiseparable_mixer(sam, separate, packed):
    shared = {"sam": sam, "state": 4, "groups": 2, "separate": separate}
    add = build("add", shared | {"shift": True, "diagonal": True}, packed).double()
    quasi, segments = build("quasiseparable", shared, packed, seed=5).double(), rows(packed, LENGTH)
    quasi.load_state_dict(add.state_dict())
    assert add.wants == quasi.wants
    given = (*inputs(add, segments), segments)
    one, other = (gradients(mixer, mixer.forward, *given) for mixer in (add, quasi))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(add.matrix(*given), quasi.matrix(*given))
    assert add.flops(LENGTH) == quasi.flops(LENGTH) and add.state_size == quasi.state_size


@pytest.mark.parametrize("sam", [False, True])
def test_forms_of_add_differ_on_the_diagonal_only_and_by_what_they_say(sam):
    diagonals, rest = {}, []
    for shift in (False, True):
        for diagonal in (False, True):
            mixer, v, features, segments = added(sam, shift, diagonal)
            if sam:  # the same c, b and dt in all four
                seen = added(True, shift, True)[2]
                features = seen._replace(conv_BLK=seen.conv_BLK[..., : mixer.wants.conv])
            with torch.no_grad():
                for name, parameter in mixer.named_parameters():
                    draw = torch.Generator().manual_seed(len(name))
                    parameter.copy_(0.5 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
            m = mixer.matrix(v, features, segments)
            diagonals[shift, diagonal] = m.diagonal(dim1=2, dim2=3)
            rest.append(m - torch.diag_embed(m.diagonal(dim1=2, dim2=3)))
    assert all(torch.equal(m, rest[0]) for m in rest) and (rest[0] != 0).sum() == HEADS * LENGTH * (LENGTH - 1)
    delta = features.conv_BLK[0, :, -HEADS:] if sam else mixer.delta_LH  # of the last form: both
    assert (diagonals[True, False] == 0).all()
    torch.testing.assert_close(diagonals[True, True][0].T, delta + mixer.D_H)
    torch.testing.assert_close(diagonals[False, True], diagonals[False, False] + diagonals[True, True])


def test_add_is_the_sum_of_two_recurrences():
    mixer, v, features, segments = added(True, False, False, groups=2)
    ahead, back = two_recurrences(mixer, v, features)
    torch.testing.assert_close(mixer(v, features, segments)[0], ahead + back)


def two_recurrences(mixer, v, features) -> tuple[torch.Tensor, torch.Tensor]:
    """The scans of the one row, token by token, of a mixer with two groups: each token's own term included."""
    cb = torch.nn.functional.silu(features.conv_BLK[0]).view(LENGTH, 2, 2, HEADS, 4)  # D, c or b, G = H, N
    dt = torch.nn.functional.softplus(features.raw_BLK[0] + mixer.dt_bias_2H).view(LENGTH, 2, HEADS)
    A = torch.exp(-dt * mixer.A_log_H.exp())
    out = []
    for d, order in ((0, range(LENGTH)), (1, reversed(range(LENGTH)))):
        state, y = torch.zeros(HEADS, 4, WIDTH, dtype=torch.float64), torch.zeros_like(v[0])
        for i in order:
            written = dt[i, d, :, None, None] * cb[i, d, 1, :, :, None] * v[0, i, :, None]
            state = A[i, d, :, None, None] * state + written
            y[i] = torch.einsum("hn,hnp->hp", cb[i, d, 0], state)
        out.append(y)
    return out[0], out[1]


def multiplied(sam: bool, groups: int = 1):
    return full("mult", {"sam": sam, "state": 4, "groups": groups, "separate": True})


def test_mult_is_the_product_of_two_recurrences():
    mixer, v, features, segments = multiplied(True, groups=2)
    ahead, back = two_recurrences(mixer, v, features)
    torch.testing.assert_close(mixer(v, features, segments)[0], ahead * back)


@pytest.mark.parametrize("sam", [False, True])
def test_mult_is_quadratic_and_has_two_triangular_factors_and_no_matrix(sam):
    mixer, v, features, segments = multiplied(sam)
    torch.testing.assert_close(mixer(3 * v, features, segments), 9 * mixer(v, features, segments))
    with pytest.raises(NotImplementedError, match="mult is not linear in v and has no matrix"):
        mixer.matrix(v, features, segments)
    lower, upper = mixer.matrices(v, features, segments)
    assert (lower.triu(1) == 0).all() and (upper.tril(-1) == 0).all()
    for cut in (1, 40, 64, 149):
        assert rank(lower[..., cut:, : cut + 1]) == min(4, cut + 1, LENGTH - cut)
        assert rank(upper[..., : cut + 1, cut:]) == min(4, cut + 1, LENGTH - cut)


@pytest.mark.parametrize("sam", [False, True])
def test_the_factors_of_mult_add_up_to_the_matrix_of_add(sam):
    mult, *given = multiplied(sam)
    add = added(sam, False, False)[0]
    add.load_state_dict(mult.state_dict())
    torch.testing.assert_close(sum(mult.matrices(*given)), add.matrix(*given))


@pytest.mark.parametrize("made", [lambda: added(True, False, True), lambda: multiplied(True)])
def test_scans_of_two_directions_survive_decays_that_underflow(made):
    mixer, v, features, segments = made()
    assert_equal_ways(mixer, v, features._replace(raw_BLK=300 * features.raw_BLK), segments, 1e-9)


def decaying(decay: str, phi: str, normalise: bool):
    return full("decay_attention", {"sam": True, "rank": 4, "decay": decay, "feature_map": phi, "normalise": normalise})


@pytest.mark.parametrize("decay", ["fixed", "selective"])
@pytest.mark.parametrize(("phi", "normalise"), [("silu", False), ("none", False), ("elu1", False), ("elu1", True)])
def test_decay_attention_without_decay_is_the_low_rank_mixer(decay, phi, normalise):
    mixer, v, features, segments = decaying(decay, phi, normalise)
    low_rank = build("low_rank", {"sam": True, "rank": 4, "feature_map": phi, "normalise": normalise}, False).double()
    expected = low_rank.matrix(v, features, segments)
    assert not torch.allclose(mixer.matrix(v, features, segments), expected, rtol=0.1)
    with torch.no_grad():
        mixer.bias_H.fill_(-1000.0)
    torch.testing.assert_close(mixer.matrix(v, features, segments), expected)


def test_fixed_decay_is_symmetric_and_a_power_of_the_distance():
    mixer, v, features, segments = decaying("fixed", "none", False)
    m = mixer.matrix(v, features._replace(conv_BLK=torch.ones_like(features.conv_BLK)), segments)
    distance = (torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)).abs()
    a = torch.tensor([1 - 1 / 32, 1 - 1 / 512], dtype=torch.float64)[:, None, None]  # of the two heads at the start
    torch.testing.assert_close(m[0], a**distance * 4 / (4 * LENGTH) ** 0.5, rtol=1e-5, atol=0)
    torch.testing.assert_close(m, m.transpose(2, 3))


def test_selective_decay_multiplies_the_reader_and_what_lies_between():
    mixer, v, features, segments = decaying("selective", "silu", False)
    m = mixer.matrix(v, features, segments)[0]
    q, k = torch.nn.functional.silu(features.conv_BLK[0]).view(LENGTH, 2, HEADS, 4).unbind(1)
    a = torch.sigmoid(-(features.raw_BLK[0] + mixer.bias_H))
    i, j, h = 20, 17, 1
    below = (q[i, h] * k[j, h]).sum() * a[20, h] * a[19, h] * a[18, h]
    above = (q[j, h] * k[i, h]).sum() * a[17, h] * a[18, h] * a[19, h]
    own = (q[i, h] * k[i, h]).sum()
    expected = torch.stack([below, above, own]) / (4 * LENGTH) ** 0.5
    torch.testing.assert_close(torch.stack([m[h, i, j], m[h, j, i], m[h, i, i]]), expected)


@pytest.mark.parametrize(("phi", "normalise"), [("silu", False), ("elu1", True)])
def test_selective_decay_survives_underflow(phi, normalise):
    mixer, v, features, segments = decaying("selective", phi, normalise)
    assert_equal_ways(mixer, v, features._replace(raw_BLK=300 * features.raw_BLK), segments, 1e-9)


@pytest.mark.parametrize("decay", ["fixed", "selective"])
def test_normalised_decaying_rows_are_positive_and_sum_to_one(decay):
    mixer, v, features, segments = decaying(decay, "elu1", True)
    segments[:, 90:] = 0
    m = mixer.matrix(v, features, segments)
    assert (m >= 0).all()
    torch.testing.assert_close(m.sum(-1), (segments > 0).double()[:, None].expand(-1, HEADS, -1))


@pytest.mark.parametrize(("length", "rows", "columns"), [(12, 3, 4), (16, 4, 4), (11, 3, 4), (1, 1, 1), (128, 11, 12)])
def test_monarch_is_the_leading_block_of_two_block_diagonals_around_a_transposition(length, rows, columns):
    mixer, v, features, segments = full("monarch", {"sam": False}, length)
    n = rows * columns
    turn = torch.eye(n, dtype=torch.float64)[torch.arange(n).view(rows, columns).T.flatten()]
    m = mixer.matrix(v, features, segments)[0]
    assert m.shape == (HEADS, length, length)
    for h in range(HEADS):
        left, right = torch.block_diag(*mixer.left_HUXY[h]), torch.block_diag(*mixer.right_HYUW[h])
        torch.testing.assert_close(m[h], (turn.T @ left @ turn @ right)[:length, :length])


def test_monarch_blocks_have_rank_one_and_the_whole_has_full_rank():
    mixer, v, features, segments = full("monarch", {"sam": False}, 144)
    m = mixer.matrix(v, features, segments)
    grid = m.view(1, HEADS, 12, 12, 12, 12)  # read row and column, written row and column
    assert torch.linalg.matrix_rank(grid.permute(0, 1, 3, 4, 2, 5), rtol=1e-9).eq(1).all()
    assert rank(m) == 144
    assert sum(p.numel() for p in mixer.parameters()) == HEADS * 2 * 12**3


def test_monarch_keeps_the_size_of_an_uncorrelated_v():
    mixer, v, features, segments = full("monarch", {"sam": False})
    assert 0.7 < float(mixer(v, features, segments).detach().norm() / v.norm()) < 1.4


def vandermonde(sam: bool, terms: int = 1, bound: float = 0.5):
    return full("vandermonde", {"sam": sam, "rank": terms, "bound": bound})


@pytest.mark.parametrize("sam", [False, True])
def test_vandermonde_entries_are_those_of_its_definition_and_not_dft(sam):
    mixer, v, features, segments = vandermonde(sam, terms=3)
    m, h = mixer.matrix(v, features, segments)[0], 1
    x = features.exact_BLK[0].view(LENGTH, 2, HEADS, 3) if sam else torch.stack([mixer.q_LHR, mixer.k_LHR], 1)
    f, g = (0.5 * torch.tanh(x)).unbind(1)
    for i, j in ((0, 0), (20, 17), (3, LENGTH - 1)):
        terms = torch.cos(2 * math.pi * f[i, h] * (j + 1)) - torch.cos(2 * math.pi * g[j, h] * (i + 1))
        torch.testing.assert_close(m[h, i, j], terms.sum() / (3 * LENGTH) ** 0.5)
    dft, *given = full("dft", {"sam": False})
    assert (m - dft.matrix(*given)).norm() > m.norm()
    assert rank(m) > LENGTH // 2 + 1


@pytest.mark.parametrize("sam", [False, True])
def test_vandermonde_of_one_term_has_a_displacement_that_only_the_border_columns_survive(sam):
    """2 cos(f) C_ij = C_i,j-1 + C_i,j+1 for its half C_ij = cos(f_i j): D C - C T has rank two, C itself many."""
    mixer, v, features, segments = vandermonde(sam)
    with torch.no_grad():  # k = 0: the other half is one everywhere
        features.exact_BLK[..., HEADS:] = 0
        if not sam:
            mixer.k_LHR.fill_(0)
    c = mixer.matrix(v, features, segments) * LENGTH**0.5 + 1
    f = mixer.frequencies(features, LENGTH)[0]
    beside = torch.diag(torch.ones(LENGTH - 1, dtype=torch.float64), 1)
    displaced = 2 * torch.cos(2 * math.pi * f) * c - c @ (beside + beside.T)
    assert displaced[..., 1:-1].abs().amax() < 1e-10 and displaced.abs().amax() > 0.1
    assert int(torch.linalg.matrix_rank(displaced, atol=1e-8).max()) == 2 and rank(c) > 20


def test_vandermonde_swaps_sign_when_rows_and_columns_trade_frequencies():
    mixer, v, features, segments = vandermonde(True, terms=4)
    swapped = features._replace(exact_BLK=torch.cat(features.exact_BLK.chunk(2, -1)[::-1], -1))
    m, other = (mixer.matrix(v, x, segments) for x in (features, swapped))
    torch.testing.assert_close(m, -other.transpose(2, 3))


def test_vandermonde_places_and_scale_are_those_of_the_document():
    mixer = build("vandermonde", {"sam": True, "rank": 4, "bound": 0.5}, True).double()
    segments = torch.tensor([[1] * 23 + [2] * 17 + [3]])
    v, features = inputs(mixer, segments)
    m = mixer.matrix(v, features, segments)
    for at in (slice(23), slice(23, 40), slice(40, 41)):
        alone = mixer.matrix(v[:, at], Features(*(x[:, at] for x in features)), torch.ones_like(segments[:, at]))
        torch.testing.assert_close(m[..., at, at], alone)
    assert (m[..., 40, 40] != 0).all()


def test_vandermonde_phases_are_accurate_at_position_8192():
    f = 0.5 * torch.tanh(torch.randn(2000, generator=torch.Generator().manual_seed(0)))
    place = torch.arange(8192 - 8, 8193)
    found = vandermonde_room.turns(f[:, None], place)
    expected = f.double()[:, None] * place
    error = found.double() - expected
    assert found.dtype == torch.float32 and (error - error.round()).abs().amax() < 4e-7  # a plain product: 2e-4
    cosine = vandermonde_room.SumOfCosines.apply(f[None, None, :, None], place[None])[0, 0]
    torch.testing.assert_close(cosine.double(), torch.cos(2 * math.pi * expected), rtol=0, atol=4e-6)


@pytest.mark.parametrize("scale", [0.3, 1.0])
@pytest.mark.parametrize("bound", [0.05, 0.5])
def test_vandermonde_starts_neither_off_nor_large_nor_equal_for_all_tokens(scale, bound):
    mixer, v, features, segments = vandermonde(True, terms=16, bound=bound)
    y = mixer(v, features._replace(exact_BLK=scale * features.exact_BLK), segments)
    gain, varying = y.norm() / v.norm(), (y - y.mean(1, keepdim=True)).norm() / v.norm()
    assert 0.5 < gain < 6 and varying > 0.5 * gain  # published: entries of 3e-4


@pytest.mark.parametrize("packed", [False, True])
def test_vandermonde_keeps_no_matrix_for_each_term(packed):
    mixer = build("vandermonde", {"sam": True, "rank": 16, "bound": 0.5}, packed)
    segments, kept = torch.ones(1, LENGTH, dtype=torch.int64), {}
    v, features = inputs(mixer, segments, torch.float32)

    def keep(x):
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        y = mixer(v, features._replace(exact_BLK=features.exact_BLK.requires_grad_()), segments)
    y.sum().backward()
    assert sum(kept.values()) < 4 * HEADS * LENGTH**2

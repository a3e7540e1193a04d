"""Backbone and shell against closed forms: short convolution, padding, packing, residuals, pooling, heads, drop path.

Axes: B batch, L length, D width, C channels, W taps, H heads, P head width, T output positions.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from bench import backbone, layers, registry
from bench.config import Backbone as Settings
from bench.config import Shell as ShellSettings
from bench.mixers.base import Features, Grant
from bench.seeds import Streams
from bench.shells.base import short_conv
from bench.tasks.base import Spec

LENGTH, WIDTH = 12, 8
SPEC = Spec("tokens", symbols=11, types=3, length=LENGTH, outputs=5, pooled=False, tied=True, packed=False, group=1)
POOLED = dataclasses.replace(SPEC, pooled=True, tied=False)
SETTINGS = Settings(2, WIDTH, "pre", 1e-5, 16, False, 1, True, 0, "mean", False, 4, 0.0, 0.0, 0.0, 0.5)
SHELL = ShellSettings(
    name="gated", directions="one", expand=2, conv_width=3, conv_causal=False, skip=True, gain=0.0, norm_eps=1e-5
)
MIXERS = {
    "attention": {"sam": True, "rank": 3},
    "dense": {"sam": False},
    "identity": {"sam": False},
    "low_rank": {"sam": True, "rank": 3, "feature_map": "silu", "normalise": False},
    "quasiseparable": {"sam": True, "state": 4, "groups": 1, "separate": False},
    "semiseparable": {"sam": True, "state": 4, "groups": 1},
    "toeplitz": {"sam": True},
    "vandermonde": {"sam": True, "rank": 3, "bound": 0.05},
}


def model_of(
    spec=SPEC, settings=SETTINGS, shell_settings=SHELL, mixer: str = "attention", order=None
) -> backbone.Backbone:
    cls = registry.mixer_class(mixer)
    args = cls.Args(**{"heads": 2} | MIXERS[mixer])
    grant = Grant(2, WIDTH * shell_settings.expand // 2, spec.length, spec.packed)
    model = backbone.Backbone(spec, settings, shell_settings, lambda: cls(grant, args, "torch"), order)
    backbone.initialise(model, Streams(0, 0), 0)
    with torch.no_grad():  # norms and biases that start as 1 and 0 would hide that they are left out
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model.double().eval()


def rows(lengths: list[int], length: int) -> dict:
    """One document a row, then padding that holds ids of real tokens."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, SPEC.symbols, (len(lengths), LENGTH), generator=draw)
    segments = (torch.arange(LENGTH) < torch.tensor(lengths)[:, None]).long()
    batch = {"tokens": tokens, "types": tokens % 3, "segments": segments}
    positions = torch.tensor([[2, 0, 4]] * len(lengths))
    return {key: value[:, :length] for key, value in batch.items()} | {"positions": positions}


def other_ids(batch: dict, where_BL: torch.Tensor) -> dict:
    """The batch with other tokens and types at some places."""
    tokens = torch.where(where_BL, (batch["tokens"] + 5) % SPEC.symbols, batch["tokens"])
    return batch | {"tokens": tokens, "types": torch.where(where_BL, (batch["types"] + 1) % 3, batch["types"])}


@pytest.mark.parametrize(("causal", "width"), [(False, 5), (True, 4), (False, 1), (True, 1)])
@pytest.mark.parametrize(
    ("row", "packed"), [([1, 1, 1, 2, 2, 3, 3, 3, 0, 0], True), ([1] * 7 + [0] * 3, True), ([1] * 7 + [0] * 3, False)]
)
def test_short_conv_is_the_explicit_sum(causal, width, row, packed):
    draw = torch.Generator().manual_seed(0)
    segments = torch.tensor([row, [1] * 10])
    x, weight, bias = (torch.randn(s, dtype=torch.float64, generator=draw) for s in ((2, 10, 3), (3, width), (3,)))
    x = x * (segments > 0)[..., None]
    y = short_conv(x, segments, weight, bias, causal, packed)
    own = width - 1 if causal else width // 2  # the tap of the token itself
    for b in range(2):
        for i in range(10):
            if segments[b, i]:
                seen = [(t, i + t - own) for t in range(width) if 0 <= i + t - own < 10]
                expected = bias + sum(weight[:, t] * x[b, j] for t, j in seen if segments[b, j] == segments[b, i])
                torch.testing.assert_close(y[b, i], expected)


@pytest.mark.parametrize("expand", [1, 2])
@pytest.mark.parametrize(("width", "skip"), [(3, True), (0, True), (3, False), (0, False)])
def test_shell_is_its_formula(width, skip, expand):
    """out(rms_norm(scale * M v + v) * silu(z)), with M the mixer's own matrix."""
    settings = dataclasses.replace(SHELL, conv_width=width, skip=skip, expand=expand)
    layer = model_of(shell_settings=settings, mixer="low_rank").layers[1].shell
    layer.scale.fill_(0.7)
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    segments = torch.ones(2, LENGTH, dtype=torch.int64)
    z, v = (x @ layer.in_zv.weight.T).chunk(2, dim=-1)
    features = x @ layer.in_features.weight.T
    if width:
        taps, more = layer.conv_v, layer.conv_features
        v = short_conv(v, segments, taps.weight_CW, taps.bias_C, False, False)
        features = short_conv(features, segments, more.weight_CW, more.bias_C, False, False)
    v_BLHP = F.silu(v).unflatten(-1, (2, -1))
    matrix = layer.mixer.matrix(v_BLHP, Features(features, features[..., :0], features[..., :0]), segments)
    y = 0.7 * torch.einsum("bhij,bjhp->bihp", matrix, v_BLHP) + skip * v_BLHP
    y = F.rms_norm(y.flatten(-2), y.flatten(-2).shape[-1:], layer.norm.weight, SHELL.norm_eps) * F.silu(z)
    torch.testing.assert_close(layer(x, segments), y @ layer.out.weight.T)


@pytest.mark.parametrize("width", [3, 0])
def test_exact_features_are_their_formula_in_the_parameters_precision_whatever_autocast_does(width):
    layer = model_of(shell_settings=dataclasses.replace(SHELL, conv_width=width), mixer="vandermonde").layers[0].shell
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    segments = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [5]])).long()
    expected = x @ layer.in_exact.weight.T * (segments > 0)[..., None]
    if width:
        taps = layer.conv_exact
        expected = short_conv(expected, segments, taps.weight_CW, taps.bias_C, False, False)
    torch.testing.assert_close(layer.mixer_inputs(x, segments)[2].exact_BLK, expected)
    layer.float()
    plain = layer.mixer_inputs(x.float(), segments)[2]
    with torch.autocast("cpu", torch.bfloat16):
        z, _, half = layer.mixer_inputs(x.float(), segments)
        low = layer.mixer_inputs(x.bfloat16(), segments)[2]
    assert z.dtype == torch.bfloat16 and low.exact_BLK.dtype == torch.float32
    assert half.exact_BLK.dtype == torch.float32 and torch.equal(half.exact_BLK, plain.exact_BLK)
    assert plain.conv_BLK.shape[-1] == plain.raw_BLK.shape[-1] == 0


def test_autocast_rounds_the_gradients_of_exact_features_as_it_rounds_those_of_all_linear_maps():
    """Rounded once, to bf16: near those in fp32, and not equal to them."""
    layer = model_of(mixer="vandermonde").layers[0].shell.float()
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(2), requires_grad=True)
    wanted = torch.randn(2, LENGTH, layer.wants.exact, generator=torch.Generator().manual_seed(3))
    segments = torch.ones(2, LENGTH, dtype=torch.int64)

    def gradients(on: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            exact = layer.exact(x, segments)
        return list(torch.autograd.grad((exact * wanted).sum(), (x, layer.in_exact.weight, layer.conv_exact.weight_CW)))

    for half, full in zip(gradients(True)[:2], gradients(False)[:2], strict=True):
        assert half.dtype == torch.float32 and 1e-5 < (half - full).norm() / full.norm() < 6e-3
    assert torch.equal(gradients(True)[2], gradients(False)[2])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
def test_a_layer_with_exact_features_is_one_graph_under_autocast():
    layer, segments = model_of(mixer="vandermonde").layers[0].float(), torch.ones(2, LENGTH, dtype=torch.int64)
    x = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(2))
    torch._dynamo.reset()  # else what other tests of this process compiled counts against the limit of recompilations
    graph = torch.compile(layer, backend="eager", fullgraph=True, dynamic=False)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(graph(x, segments), layer(x, segments))


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_parameters_for_a_kind_of_feature_exist_only_where_it_is_asked_for(mixer):
    layer = model_of(mixer=mixer).layers[0].shell
    names, wants = {name.split(".")[0] for name, _ in layer.named_parameters()}, layer.mixer.wants
    assert ("in_exact" in names) == ("conv_exact" in names) == (wants.exact > 0)
    assert ("in_features" in names) == (wants.conv + wants.raw > 0) and ("conv_features" in names) == (wants.conv > 0)


@pytest.mark.parametrize("pooling", ["mean", "first", None])
@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_padding_never_reaches_an_output(mixer, pooling):
    """Neither what stands in the padding nor how much of it follows: pooled outputs and outputs by position."""
    spec, settings = (POOLED, dataclasses.replace(SETTINGS, pooling=pooling)) if pooling else (SPEC, SETTINGS)
    model = model_of(spec, settings, mixer=mixer)
    long = rows([6, 5], LENGTH)
    output = model(long)
    torch.testing.assert_close(model(other_ids(long, long["segments"] == 0)), output)
    torch.testing.assert_close(model(rows([6, 5], 6)), output)
    assert not torch.allclose(model(other_ids(long, long["segments"] == 1)), output)


def keeps_documents_apart(model) -> None:
    """A change of one document of a packed row changes the outputs on all of that document and on no other."""
    segments = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0]])
    batch = rows([LENGTH], LENGTH) | {"segments": segments, "positions": torch.arange(LENGTH)[None]}
    output = model(batch)
    for changed in (1, 2, 3, 0):
        moved = (model(other_ids(batch, segments == changed)) - output).abs().amax(-1) > 1e-9
        assert not moved[(segments != changed) & (segments > 0)].any()
        assert changed == 0 or moved[segments == changed].all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_packed_documents_do_not_see_one_another(mixer, causal):
    """A change of one document changes the outputs on that document and no others."""
    spec = dataclasses.replace(SPEC, packed=True)
    model = model_of(spec, shell_settings=dataclasses.replace(SHELL, conv_causal=causal), mixer=mixer)
    keeps_documents_apart(model)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_layers_are_their_residual_formula(norm):
    model = model_of(settings=dataclasses.replace(SETTINGS, norm=norm))
    batch = rows([LENGTH], LENGTH)
    x = model.embedding(batch)
    for layer in model.layers:
        up, _, down = layer.mlp
        for ln, f in (
            (layer.norm, lambda u, layer=layer: layer.shell(u, batch["segments"])),
            (layer.mlp_norm, lambda u, up=up, down=down: down(F.gelu(up(u)))),
        ):
            x = x + f(ln(x)) if norm == "pre" else ln(x + f(x))
    x = model.norm(x) if norm == "pre" else x
    torch.testing.assert_close(model.hidden(batch), x)
    assert isinstance(model.norm, torch.nn.LayerNorm) == (norm == "pre")


def test_embedding_is_normalised_sum_of_token_type_and_position():
    model = model_of()
    batch, e = rows([LENGTH, LENGTH], LENGTH), model.embedding
    plain = e.tokens.weight[batch["tokens"]] + e.types.weight[batch["types"]] + e.positions.weight
    torch.testing.assert_close(e(batch), F.layer_norm(plain, (WIDTH,), e.norm.weight, e.norm.bias, SETTINGS.norm_eps))
    assert e.tokens.num_embeddings == 12  # 11 ids, rounded up to a multiple of 4
    bare = model_of(dataclasses.replace(SPEC, types=0), dataclasses.replace(SETTINGS, positions=False)).embedding
    assert bare.types is None and bare.positions is None


def test_a_row_of_a_small_table_gets_the_sum_of_the_gradients_of_its_tokens():
    weight, index = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.randint(3, (5, 7))
    found, gradient = backbone.of_few(weight, index), torch.randn(5, 7, 4, dtype=torch.float64)
    assert torch.equal(found, weight[index])
    found.backward(gradient)
    torch.testing.assert_close(weight.grad, F.one_hot(index, 3).flatten(0, 1).T.double() @ gradient.flatten(0, 1))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # the compiler's own
@pytest.mark.parametrize("compiled", [False, True])
def test_the_gradients_of_types_and_positions_repeat_bit_for_bit(compiled):
    spec = dataclasses.replace(SPEC, types=2, length=128)
    embedding = backbone.Embedding(spec, dataclasses.replace(SETTINGS, width=256, dropout=0.0)).to("cuda")
    if compiled:
        embedding.placed = torch.compile(embedding.placed, dynamic=False)
    tokens = torch.randint(spec.symbols, (512, 128), device="cuda")
    batch = {"tokens": tokens, "types": torch.zeros_like(tokens), "segments": torch.ones_like(tokens)}
    gradients = [torch.randn(512, 128, 256, device="cuda", dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    weights = embedding.types.weight, embedding.positions.weight, embedding.norm.weight
    found = [torch.autograd.grad(embedding.both(batch, torch.bfloat16), weights, gradients) for _ in range(5)]
    assert all(x.any() for x in found[0])
    assert all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


def test_a_copy_of_what_the_layers_get_is_what_they_get():
    settings = dataclasses.replace(SETTINGS, dropout=0.5)
    model, batch = model_of(settings=settings), rows([LENGTH, LENGTH], LENGTH)
    for training in (True, False):
        x, narrow = model.train(training).embedding.both(batch, torch.bfloat16)
        assert torch.equal(x.bfloat16(), narrow) and x.eq(0).any() == training


def test_outputs_are_those_of_the_asked_positions_and_the_tied_head_decodes_with_the_embedding():
    batch = rows([LENGTH, LENGTH], LENGTH)
    for tied in (False, True):
        model = model_of(settings=dataclasses.replace(SETTINGS, tied=tied))
        x = model.hidden(batch)[:, [2, 0, 4]]
        if tied:
            head = model.head
            x = head.norm(F.gelu(head.transform(x)))
            expected = x @ model.embedding.tokens.weight.T + head.bias
        else:
            expected = x @ model.head.weight.T + model.head.bias
        torch.testing.assert_close(model(batch), expected)
    names = [name for name, _ in model.named_parameters()]
    assert not any(name.startswith("head.") and "token" in name for name in names)
    x = model.hidden(batch)[:, [2, 0, 4]].detach()  # the gradient reaches the embedding through the decoder too
    model.head(x, model.embedding.tokens.weight).square().sum().backward()
    assert model.embedding.tokens.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("pooling", ["mean", "first"])
def test_pooling_closed_form(pooling):
    model = model_of(POOLED, dataclasses.replace(SETTINGS, pooling=pooling))
    batch = rows([6, 9], LENGTH)
    x = model.hidden(batch)
    if pooling == "mean":
        pooled = torch.stack([x[0, :6].mean(0), x[1, :9].mean(0)])
    else:
        pooled = torch.tanh(model.pooler(x[:, 0]))
    torch.testing.assert_close(model(batch), model.head(pooled))


def test_drop_path_leaves_out_whole_examples_keeps_the_mean_and_grows_with_depth():
    drop = layers.DropPath(0.4).train()
    torch.manual_seed(0)
    y = drop(torch.ones(4000, 2, 3))
    assert (y.amin((1, 2)) == y.amax((1, 2))).all()  # an example is left out or kept whole
    assert sorted(y.unique().tolist()) == pytest.approx([0, 1 / 0.6])
    assert y.mean() == pytest.approx(1, abs=0.06)  # three standard errors: 0.04
    assert torch.equal(drop.eval()(torch.ones(50, 2, 3)), torch.ones(50, 2, 3))
    model = model_of(settings=dataclasses.replace(SETTINGS, layers=3, drop_path=0.4))
    assert [layer.drop_path.rate for layer in model.layers] == pytest.approx([0.0, 0.2, 0.4])


@pytest.mark.parametrize("rates", [{"dropout": 0.5}, {"drop_path": 0.5}])
def test_dropout_and_drop_path_act_in_training_only(rates):
    model, plain = (model_of(POOLED, s) for s in (dataclasses.replace(SETTINGS, **rates), SETTINGS))
    batch = rows([LENGTH] * 4, LENGTH)
    assert torch.equal(model(batch), plain(batch)) and torch.equal(model(batch), model(batch))
    torch.manual_seed(0)
    assert not torch.equal(model.train()(batch), plain(batch))


def test_calibration_measures_real_tokens_without_dropout_and_leaves_the_scale_unless_asked():
    settings = dataclasses.replace(SETTINGS, dropout=0.5, drop_path=0.5)
    model, batch = model_of(settings=settings).train(), rows([6, 5], LENGTH)
    gains = backbone.calibrate(model, batch, 0.0)
    assert model.training and all(layer.shell.scale == 1 for layer in model.layers)
    first = model.layers[0]
    x = first.norm(model.eval().embedding(batch))
    _, v_BLHP, features = first.shell.mixer_inputs(x, batch["segments"])
    y_BLHP = first.shell.mixer(v_BLHP, features, batch["segments"])
    real = [(0, slice(6)), (1, slice(5))]
    v_norm = torch.cat([v_BLHP[at].flatten() for at in real]).norm()
    total = torch.cat([y_BLHP[at].flatten() for at in real]).norm() / v_norm
    varying = torch.cat([(y_BLHP[at] - y_BLHP[at].mean(0)).flatten() for at in real]).norm() / v_norm
    assert gains[0] == pytest.approx((total.item(), varying.item()), rel=1e-6)
    assert backbone.calibrate(model, batch, 2.0)[0] == pytest.approx(gains[0])
    assert first.shell.scale.item() == pytest.approx(2 / gains[0][0])
    again, scales = backbone.calibrate(model, batch, 0.0), [float(layer.shell.scale) for layer in model.layers]
    assert [gain * scale for (gain, _), scale in zip(again, scales, strict=True)] == pytest.approx([2, 2])


@pytest.mark.parametrize(("mixer", "kind"), [("low_rank", "features"), ("vandermonde", "exact")])
def test_shared_digest_sees_each_shared_value_and_no_mixer_value(mixer, kind):
    model = model_of(mixer=mixer)
    before, owned = backbone.shared_digest(model), 0
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter[(0,) * parameter.ndim] += 1
            mine = name.split(".")[3:4] in (["mixer"], [f"in_{kind}"], [f"conv_{kind}"])
            assert (backbone.shared_digest(model) == before) == mine, name
            owned += mine
            parameter[(0,) * parameter.ndim] -= 1
            before = backbone.shared_digest(model)  # x + 1 - 1 may round
    assert owned == 2 * 3


def test_two_parameters_of_one_shape_are_different_draws():
    model = model_of()
    one, two = model.layers[0].shell, model.layers[1].shell
    assert not torch.equal(one.in_zv.weight, two.in_zv.weight)

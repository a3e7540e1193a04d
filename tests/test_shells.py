"""Shells against closed forms and against torch's own layers; isolation, streams, calibration, refusals, training.

Axes: B batch, L length, D width, C inner channels, H heads, P head width.
"""

import dataclasses
import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench import Refusal, backbone, registry, train
from bench.compose import ROOT, compose_group, make_run, shipped
from bench.config import Protocol, build
from bench.config import Shell as Settings
from bench.mixers.base import Features
from bench.record import read_records
from bench.seeds import Streams
from bench.shells.base import find, names, owned_by_mixer, short_conv
from tests.conftest import built, setting, shrunk
from tests.test_backbone import (
    LENGTH,
    MIXERS,
    POOLED,
    SETTINGS,
    SHELL,
    SPEC,
    WIDTH,
    keeps_documents_apart,
    model_of,
    other_ids,
    rows,
)

MIXERS |= {
    "fourier": {"sam": False},
    "s4": {"sam": False, "state": 4},
    "hyena": {"sam": True, "span": 9, "bands": 2, "hidden": 5, "inner": 1, "frequency": 3.0, "bidirectional": True},
}
OTHERS = [name for name in names() if name != "gated"]
TRIED = ("attention", "dense", "vandermonde", "hyena", "semiseparable")  # raw, exact and convolved features, none


def settings(name: str, **changes) -> Settings:
    return build(Settings, {**compose_group("shell", name), **changes}, "shell")


def a_model(name: str, mixer: str, spec=SPEC, own=SETTINGS, **changes) -> backbone.Backbone:
    return model_of(spec, own, settings(name, **changes), mixer)


def a_shell(name: str, mixer: str, **changes):
    return a_model(name, mixer, **changes).layers[1].shell


def inputs(length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return x, torch.ones(2, length, dtype=torch.int64)


def mixed(mixer, v_BLC: torch.Tensor, conv_BLK: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """M v by the mixer's own matrix, BLC."""
    v_BLHP = v_BLC.unflatten(-1, (mixer.grant.heads, -1))
    m_BHLL = mixer.matrix(v_BLHP, Features(conv_BLK, conv_BLK[..., :0], conv_BLK[..., :0]), segments)
    return torch.einsum("bhij,bjhp->bihp", m_BHLL, v_BLHP).flatten(-2)


def test_every_shell_has_a_yaml_and_a_docstring_with_its_source():
    assert names() == shipped("shell") == ["fnet", "gated", "glu", "m2", "plain", "token_mlp"]
    for name in names():
        assert find(settings(name)).__module__ == f"bench.shells.{name}"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(("name", "mixer"), [("plain", "dense"), ("fnet", "fourier"), ("gated", "dense")])
def test_a_fused_model_has_a_fused_loss_whatever_its_shell(name, mixer):
    model = a_model(name, mixer)
    assert not model.fused
    backbone.fuse(model)
    assert model.fused and {layer.shell.backend for layer in model.layers} == {"triton" if name == "gated" else "torch"}
    assert "cross_entropy" in dir(torch.ops.mixerbench)


def test_attention_in_the_plain_shell_is_torchs_multi_head_attention():
    (x, segments), heads, rank = inputs(), 2, WIDTH // 2
    shell = a_shell("plain", "attention")
    whole = nn.MultiheadAttention(WIDTH, heads, batch_first=True, dtype=torch.float64)
    wide = nn.Linear(WIDTH, 2 * WIDTH).double()
    mixer = type(shell.mixer)(shell.mixer.grant, type(shell.mixer).Args(True, heads, rank), "torch")
    shell.mixer, shell.in_features = mixer, wide
    with torch.no_grad():
        whole.in_proj_weight.copy_(torch.cat((wide.weight, shell.in_v.weight)))
        whole.in_proj_bias.copy_(torch.cat((wide.bias, shell.in_v.bias)))
        whole.out_proj.load_state_dict(shell.out.state_dict())
    segments[1, 7:] = 0
    expected = whole(x, x, x, key_padding_mask=segments == 0)[0]
    torch.testing.assert_close(shell(x, segments)[segments > 0], expected[segments > 0])


def test_a_layer_with_post_norm_and_a_channel_mlp_is_torchs_transformer_layer_but_for_its_attention():
    layer = a_model("plain", "attention", own=dataclasses.replace(SETTINGS, norm="post")).layers[0]
    x, segments = inputs()
    whole = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, "gelu", 1e-5, batch_first=True, dtype=torch.float64)
    for mine, theirs in (
        (layer.norm, whole.norm1),
        (layer.mlp_norm, whole.norm2),
        (layer.mlp[0], whole.linear1),
        (layer.mlp[2], whole.linear2),
    ):
        theirs.load_state_dict(mine.state_dict())
    whole._sa_block = lambda x, *_, is_causal: layer.shell(x, segments)
    torch.testing.assert_close(layer(x, segments)[0], whole.train()(x))


@pytest.mark.parametrize("causal", [False, True])
def test_hyena_in_the_plain_shell_is_its_operator(causal):
    """x0 * (k * (x1 v)), of short convolutions of one projection, and a map out; every sum written out."""
    shell, (x, segments) = a_shell("plain", "hyena", conv_width=3, conv_causal=causal), inputs()
    projected = torch.cat((shell.in_v(x), shell.in_features(x)), dim=-1)
    weight = torch.cat((shell.conv_v.weight_CW, shell.conv_features.weight_CW))
    bias = torch.cat((shell.conv_v.bias_C, shell.conv_features.bias_C))
    v, gates = short_conv(projected, segments, weight, bias, causal, False).split((WIDTH, 4), dim=-1)
    after, before = (gate.repeat_interleave(WIDTH // 2, -1) for gate in gates.split(2, dim=-1))
    behind, ahead = shell.mixer.weights(LENGTH)
    y = torch.zeros_like(v)
    for i in range(LENGTH):
        for j in range(LENGTH):
            k_H = behind[:, i - j] if i >= j else ahead[:, j - i - 1]
            y[:, i] += k_H.repeat_interleave(WIDTH // 2) * before[:, j] * v[:, j]
    torch.testing.assert_close(shell(x, segments), shell.out(after * y))


def test_the_m2_shell_adds_a_plain_convolution_of_the_stream_and_its_layer_has_no_residual():
    model, (x, segments) = a_model("m2", "hyena"), inputs()
    layer = model.layers[1]
    shell, (gated, second) = layer.shell, layer.shell.mixer
    shell.scale.copy_(torch.tensor([0.7, 1.3]))
    v = short_conv(shell.in_v(x), segments, shell.conv_v.weight_CW, shell.conv_v.bias_C, True, False)
    taps = shell.conv_features
    features = short_conv(shell.in_features(x), segments, taps.weight_CW, taps.bias_C, True, False)
    y = 0.7 * mixed(gated, v, features, segments)
    bare = type(second)(second.grant, dataclasses.replace(second.args, sam=False), "torch").double()
    bare.load_state_dict(second.state_dict())
    y = y + 1.3 * mixed(bare, x, features[..., :0], segments)
    torch.testing.assert_close(shell(x, segments), shell.out(y))
    own = dataclasses.replace(SETTINGS, channel_mlp=0)
    bare = a_model("m2", "hyena", own=own).layers[0]
    torch.testing.assert_close(bare(x, segments)[0], bare.shell(x, segments))
    assert layer.norm is None and not any(name.startswith("norm") for name, _ in layer.named_parameters())


def test_the_fnet_shell_with_the_fourier_mixer_is_the_real_part_of_the_two_dimensional_dft():
    shell, (x, segments) = a_shell("fnet", "fourier"), inputs()
    torch.testing.assert_close(shell(x, segments), torch.fft.fft2(x).real)
    assert not list(shell.parameters())


def test_the_token_mlp_is_one_pair_of_matrices_over_tokens():
    shell, (x, segments) = a_shell("token_mlp", "identity"), inputs()
    dense = registry.mixer_class("dense")
    grant = dataclasses.replace(shell.mixer.grant, heads=1, head_width=WIDTH)
    for place in (0, 1):
        shell.mixer[place] = dense(grant, dense.Args(False, 1), "torch").double()
        nn.init.normal_(shell.mixer[place].m_HLL, generator=torch.Generator().manual_seed(place))
    one, two = (m.m_HLL[0] for m in shell.mixer)
    expected = torch.einsum("ij,bjd->bid", two, F.gelu(torch.einsum("ij,bjd->bid", one, x)))
    torch.testing.assert_close(shell(x, segments), expected)


@pytest.mark.parametrize("channels", [1, 2])
def test_the_glu_shell_is_its_formula(channels):
    shell, (x, segments) = a_shell("glu", "s4", expand=channels), inputs()
    v = torch.cat([x] * channels, dim=-1)
    y = mixed(shell.mixer, v, x[..., :0], segments) + shell.skip.d_C * v
    a, b = shell.out(F.gelu(y)).chunk(2, dim=-1)
    torch.testing.assert_close(shell(x, segments), a * torch.sigmoid(b))


@pytest.mark.parametrize("name", [*OTHERS, "plain, centred"])
@pytest.mark.parametrize("mixer", TRIED)
def test_padding_never_reaches_an_output(name, mixer):
    name, _, centred = name.partition(", ")
    model = a_model(name, mixer, POOLED, **({"conv_width": 3} if centred else {}))
    long = rows([6, 5], LENGTH)
    output = model(long)
    torch.testing.assert_close(model(other_ids(long, long["segments"] == 0)), output)
    torch.testing.assert_close(model(rows([6, 5], 6)), output)
    assert not torch.allclose(model(other_ids(long, long["segments"] == 1)), output)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("mixer", TRIED)
def test_packed_documents_do_not_see_one_another(name, mixer):
    keeps_documents_apart(a_model(name, mixer, dataclasses.replace(SPEC, packed=True)))


@pytest.mark.parametrize("name", OTHERS)
def test_shared_parameters_of_two_mixers_are_bitwise_equal_and_all_mixers_get_what_they_ask_for(name):
    every = {mixer: dict(backbone.shared(a_model(name, mixer))) for mixer in TRIED}
    first = every["dense"]
    for mixer, one in every.items():
        assert list(one) == list(first) and all(torch.equal(one[key], first[key]) for key in first), mixer
        owned = [n for n, _ in a_model(name, mixer).layers[0].shell.named_parameters() if owned_by_mixer(n)]
        assert any("in_exact" in n for n in owned) == (mixer == "vandermonde")
        assert any("in_features" in n for n in owned) == (mixer in ("attention", "hyena", "semiseparable"))


@pytest.mark.parametrize("name", OTHERS)
def test_calibration_reaches_every_mixer_inside(name):
    model, batch = a_model(name, "hyena"), rows([6, 5], LENGTH)
    count = 2 if name in ("m2", "token_mlp") else 1
    assert len(model.parts()) == count * len(model.layers)
    backbone.calibrate(model, batch, 2.0)
    gains = backbone.calibrate(model, batch, 0.0)
    scaled = [gain * float(scale) for (gain, _), (_, scale) in zip(gains, model.parts(), strict=True)]
    assert scaled == pytest.approx([2.0] * len(scaled))


@pytest.mark.parametrize("name", OTHERS)
def test_misaligned_features_are_another_tokens_in_every_shell(name):
    x, segments = inputs()
    changes = settings(name)
    plain, odd = (model_of(SPEC, SETTINGS, changes, "attention", order).layers[0].shell for order in (None, 2**60 + 77))
    assert not torch.allclose(plain(x, segments), odd(x, segments))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("bert", {}, "protocol.shell.name must be one of fnet, gated, glu, m2, plain, token_mlp, got 'bert'"),
        ("base", {}, "protocol.shell.name must be one of"),
        ("fnet", {"expand": 1}, r"shell 'fnet' has protocol.shell.expand 2.0, got 1.0"),
        ("plain", {"directions": "add"}, "shell 'plain' has other keys only; set protocol.shell: directions='one'"),
        ("glu", {"conv_width": 3, "skip": True}, "set protocol.shell: conv_width=0, skip=False"),
    ],
)
def test_a_shell_that_is_not_there_or_has_not_that_key_is_refused_before_a_run_starts(name, changes, message):
    own = {f"protocol.shell.{k}": v for k, v in (compose_group("shell", "plain") | {"name": name} | changes).items()}
    with pytest.raises(Refusal, match=message):
        registry.check(make_run("quick_recall", "dense", own, 0, 0))


@pytest.mark.parametrize("name", names())
def test_every_shell_trains_two_steps_from_its_yaml(name, tmp_path):
    own = {f"protocol.shell.{k}": v for k, v in compose_group("shell", name).items()}
    run = shrunk(make_run("quick_recall", "toeplitz", own | {"protocol.backbone.channel_mlp": 16}, 0, 0))
    model, task = built(run)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    training = train.Training(model, task, run.protocol, Streams(0, 0), setting(tmp_path))
    train.fit(training)
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert not [n for n in still if ".shell." in n and "toeplitz" not in n]


# Parts of the layer that other blocks need ---------------------------------------------------------------------------


def test_block_linear_is_a_block_diagonal_map_that_starts_with_a_dense_ones_variance():
    own = dataclasses.replace(SETTINGS, mlp_gated=True, mlp_blocks=4, channel_mlp=64)
    model = a_model("plain", "dense", own=own)
    mlp, x = model.layers[0].mlp, inputs()[0]
    up, down = (torch.block_diag(*m.weight) for m in (mlp.up, mlp.down))
    a, b = (x @ up.T).chunk(2, dim=-1)
    torch.testing.assert_close(mlp(x), (F.gelu(a) * b) @ down.T + mlp.down.bias)
    assert mlp.up.bias is None and mlp.up.weight.shape == (4, 32, 2)
    assert mlp.down.weight.std().item() == pytest.approx(2 * SETTINGS.init_std, rel=0.2)


def test_an_mlp_whose_blocks_do_not_divide_it_is_refused():
    with pytest.raises(Refusal, match="mlp_blocks must divide width 32 and channel_mlp 6, got 4"):
        own = {"protocol.backbone.mlp_blocks": 4, "protocol.backbone.channel_mlp": 6}
        make_run("quick_recall", "dense", own, 0, 0)


def test_hidden_dropout_acts_on_every_residual_branch_in_training_only():
    own = dataclasses.replace(SETTINGS, hidden_dropout=0.5)
    model, plain, batch = (
        a_model("plain", "dense", POOLED, own),
        a_model("plain", "dense", POOLED),
        rows([6, 5], LENGTH),
    )
    assert torch.equal(model(batch), plain(batch))
    layer, (x, segments) = model.train().layers[0], inputs()
    layer.mlp = None
    torch.manual_seed(0)
    added = layer(x, segments)[0] - x
    whole = layer.shell(layer.norm(x), segments)
    kept = added.abs() > 1e-12
    assert 0.3 < kept.double().mean() < 0.7
    torch.testing.assert_close(added[kept], 2 * whole[kept])


def test_a_fine_tuning_on_longer_rows_shares_a_table_of_positions_with_its_parent_if_it_is_long_enough():
    own = {"protocol.backbone.positions": True, "protocol.backbone.position_rows": 512}
    child = make_run("main_cola", "attention", own, 0, 0)
    rows_of = [built(r, "meta")[0].embedding.positions.num_embeddings for r in (child, child.parent)]
    assert rows_of == [512, 512]
    short = make_run("main_cola", "attention", own | {"protocol.backbone.position_rows": 128}, 0, 0)
    with pytest.raises(Refusal, match="position_rows must be 0 or at least the task's length 256, got 128"):
        built(short, "meta")


def test_the_shared_values_of_committed_records_are_drawn_again_bit_for_bit():
    """Whatever shells come: the evidence's initial values are the common shell's of today."""
    found = 0
    for path in sorted((ROOT / "results").glob("*/records.jsonl")):
        record = next((r for r in read_records(path).values() if not r.run["protocol"]["init"]), None)
        if record is None:
            continue
        protocol, _, varied = record.label.rstrip("]").partition("[")
        own = {f"protocol.{key}": float(value) for key, _, value in (v.partition("=") for v in varied.split(", ") if v)}
        run = make_run(protocol, record.run["mixer"]["name"], own, record.run["seed"], 0)
        assert run.protocol_id == record.protocol_id
        assert backbone.shared_digest(built(run)[0]) == record.hashes.shared_init, path
        found += 1
    assert found >= 2


@pytest.mark.parametrize("mixer", ["attention", "dense", "quasiseparable"])
def test_without_a_convolution_the_fused_shell_gives_the_mixer_autocasts_dtype(mixer):
    """The stream is fp32 under autocast; a mask in its dtype made the mixer's inputs fp32, and its products slow."""
    shell = model_of(shell_settings=dataclasses.replace(SHELL, conv_width=0), mixer=mixer).layers[1].shell.float()
    shell.backend = "triton"  # nothing here is a kernel
    x_BLD, segments_BL = inputs()
    segments_BL[1, 5:] = 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, v_BLHP, features = shell.mixer_inputs(x_BLD.float(), segments_BL)
    assert {v_BLHP.dtype, features.conv_BLK.dtype} == {torch.bfloat16}
    assert v_BLHP[0].all() and not v_BLHP[1, 5:].any() and not features.conv_BLK[1, 5:].any()


def test_a_protocol_can_take_a_shell_from_its_yaml():
    values = dataclasses.asdict(make_run("quick_recall", "dense", {}, 0, 0).protocol)
    taken = build(Protocol, values | {"shell": compose_group("shell", "plain")}, "protocol")
    assert taken.shell.name == "plain" and taken.inner == taken.backbone.width

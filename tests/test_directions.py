"""Two directions as a shell: reversal inside documents, closed forms by matrices, isolation, counts, training.

Axes: B batch, L length, D width, C inner channels, H heads, P head width.
"""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from bench import Refusal, backbone, registry
from bench.compose import make_run
from bench.config import inner_width
from bench.directions import mirror, turned
from bench.mixers.base import Features
from bench.run import build, calibrated, execute, load_parent
from bench.seeds import Streams
from bench.shells.base import owned_by_mixer, short_conv
from tests.conftest import built, shrunk
from tests.test_backbone import LENGTH, SETTINGS, SHELL, SPEC, WIDTH, model_of, other_ids, rows

DIRECTIONS = ("one", "concat", "add", "mult")
TWO = DIRECTIONS[1:]
ORDERS = {"aligned": None, "misaligned": 2**60 + 77}
PACKED = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0]])
QUICK = {"protocol.budget.steps": 2, "protocol.budget.batch": 4, "protocol.task.held_out": 8}


def a_model(directions: str, mixer: str = "semiseparable", order: int | None = None, packed: bool = False):
    settings = dataclasses.replace(SHELL, directions=directions)
    return model_of(dataclasses.replace(SPEC, packed=packed), SETTINGS, settings, mixer, order)


def a_run(directions: str, mixer: str = "semiseparable", protocol: str = "quick_recall", **changes):
    own = {"protocol.shell.directions": directions, "mixer.heads": 2}
    return make_run(protocol, mixer, own | {k.replace("__", "."): v for k, v in changes.items()}, 0, 0)


def hidden_inputs(length: int = LENGTH, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_documents_are_reversed_where_they_stand_and_padding_is_not():
    segments = torch.tensor([[1, 1, 1, 2, 2, 3, 0, 0], [1] * 8, [1] * 5 + [0] * 3, [0] * 8])
    expected = torch.tensor([[2, 1, 0, 4, 3, 5, 6, 7], list(range(7, -1, -1)), [4, 3, 2, 1, 0, 5, 6, 7], range(8)])
    assert torch.equal(mirror(segments), expected)
    x = torch.randn(4, 8, 3, 2)
    back = turned(x, mirror(segments))
    assert torch.equal(back, torch.stack([row[at] for row, at in zip(x, expected, strict=True)]))
    assert torch.equal(turned(back, mirror(segments)), x) and torch.equal(back[1], x[1].flip(0))


@pytest.mark.parametrize("directions", ["add", "mult"])
def test_two_shells_are_the_forward_block_and_the_reversed_rows_block(directions):
    shell, x = a_model(directions).layers[1].shell, hidden_inputs()
    segments = torch.ones(x.shape[:2], dtype=torch.int64)
    forth, back = shell.forth(x, segments), shell.back(x.flip(1), segments).flip(1)
    torch.testing.assert_close(shell(x, segments), forth + back if directions == "add" else forth * back)
    names = [[n for n, _ in one.named_parameters()] for one in (shell.forth, shell.back)]
    assert names[0] == names[1] and len(list(shell.parameters())) == 2 * len(names[0])
    assert not torch.equal(shell.forth.in_zv.weight, shell.back.in_zv.weight)


@pytest.mark.parametrize("mixer", ["semiseparable", "attention", "vandermonde", "dense"])
def test_concat_is_its_formula_by_the_matrices_of_both_mixers(mixer):
    """out(rms_norm([a M v + v, b R M' R v + v]) * silu([z, z])): R reverses, M' is of the features' second half."""
    shell, x = a_model("concat", mixer).layers[0].shell, hidden_inputs()
    segments, heads = torch.ones(x.shape[:2], dtype=torch.int64), shell.mixer.grant.heads
    for (_, scale), value in zip(shell.parts(), (0.7, 1.3), strict=True):
        scale.fill_(value)
    z, v = (x @ shell.in_zv.weight.T).chunk(2, dim=-1)
    v = F.silu(short_conv(v, segments, shell.conv_v.weight_CW, shell.conv_v.bias_C, False, False))
    v_BLHP = v.unflatten(-1, (heads, -1))
    kinds = shell.mixer_inputs(x, segments)[2]
    assert [k.shape[-1] for k in kinds] == list(dataclasses.astuple(shell.wants))
    one, two = (Features(*(k.chunk(2, dim=-1)[half] for k in kinds)) for half in (0, 1))
    m = shell.mixer.forth.matrix(v_BLHP, one, segments)
    n = shell.mixer.back.matrix(v_BLHP.flip(1), Features(*(k.flip(1) for k in two)), segments).flip(2, 3)
    y = [torch.einsum("bhij,bjhp->bihp", a * x, v_BLHP) + v_BLHP for a, x in ((0.7, m), (1.3, n))]
    y = torch.cat(y, dim=2).flatten(2)
    y = F.rms_norm(y, y.shape[-1:], shell.norm.weight, SHELL.norm_eps) * F.silu(torch.cat((z, z), dim=-1))
    torch.testing.assert_close(shell(x, segments), y @ shell.out.weight.T)


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_every_token_sees_every_other_with_two_directions_and_only_earlier_ones_with_one(directions):
    """Through a mixer that looks one way; the convolution reaches one token either way."""
    shell, x = a_model(directions).layers[0].shell, hidden_inputs(rows=1)
    segments = torch.ones(x.shape[:2], dtype=torch.int64)
    for changed in (0, 5, LENGTH - 1):
        other = x.clone()
        other[:, changed] += 1
        moved = (shell(other, segments) - shell(x, segments)).abs().amax(-1)[0] > 1e-9
        assert moved.tolist() == [directions != "one" or i >= changed - 1 for i in range(LENGTH)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mixer", ["semiseparable", "attention", "toeplitz", "vandermonde"])
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_neither_padding_nor_its_amount_reaches_an_output(directions, mixer, order):
    model, long = a_model(directions, mixer, ORDERS[order]), rows([6, 5], LENGTH)
    output = model(long)
    torch.testing.assert_close(model(other_ids(long, long["segments"] == 0)), output)
    torch.testing.assert_close(model(rows([6, 5], 6)), output)
    assert not torch.allclose(model(other_ids(long, long["segments"] == 1)), output)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mixer", ["semiseparable", "attention", "toeplitz", "vandermonde"])
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_a_packed_document_gets_what_it_gets_alone(directions, mixer, order):
    """Positions are of the row, so the hidden states are compared from the layers on."""
    model, x = a_model(directions, mixer, ORDERS[order], packed=True), hidden_inputs(rows=1)
    alone, packed = x.clone(), x.clone()
    for layer in model.layers:
        packed, _ = layer(packed, PACKED)
    for number in (1, 2, 3):
        (at,) = (PACKED[0] == number).nonzero(as_tuple=True)
        own = alone[:, at]
        for layer in model.layers:
            own, _ = layer(own, torch.ones(1, len(at), dtype=torch.int64))
        torch.testing.assert_close(packed[:, at], own)


@pytest.mark.parametrize("directions", TWO)
def test_shared_tensors_of_two_arms_are_equal_and_a_mixers_own_are_named_as_its_own(directions):
    models = [built(a_run(directions, mixer))[0] for mixer in ("semiseparable", "attention", "dense")]
    for one, two in itertools.combinations([dict(backbone.shared(m)) for m in models], 2):
        assert list(one) == list(two) and all(torch.equal(one[n], two[n]) for n in one)
    assert len({backbone.shared_digest(m) for m in models}) == 1
    for model in models:
        mixers = [dict(mixer.named_parameters()) for mixer, _ in model.parts()]
        assert len(mixers) == 2 * len(model.layers)
        inside = {id(p) for values in mixers for p in values.values()}
        assert all(owned_by_mixer(n) for n, p in model.named_parameters() if id(p) in inside)
    one, two = (dict(mixer.named_parameters()) for mixer, _ in models[2].parts())
    assert not any(torch.equal(one[n], two[n]) for n in one)  # each direction has values of its own


def test_concat_of_three_quarters_the_width_has_the_parameters_of_one_and_two_shells_have_twice_a_shells():
    def counts(directions, expand):
        model, _ = built(a_run(directions, protocol="mini_mlm", protocol__shell__expand=expand), "meta")
        sizes = {n: p.numel() for n, p in model.named_parameters()}
        shared = sum(size for n, size in sizes.items() if not owned_by_mixer(n))
        return sum(sizes.values()), shared, sum(size for n, size in sizes.items() if ".shell." in n)

    one, concat, add = counts("one", 2), counts("concat", 1.5), counts("add", 2)
    assert concat[0] == pytest.approx(one[0], rel=0.02) and concat[1] == pytest.approx(one[1], rel=0.001)
    assert add[2] == 2 * one[2] and add[0] - one[0] == one[2]


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_ids_know_the_directions_and_an_expand_that_is_whole_is_the_integer(directions):
    plain = make_run("quick_recall", "semiseparable", {"mixer.heads": 2}, 0, 0)
    assert (a_run(directions).id == plain.id) == (directions == "one")
    assert a_run(directions, protocol__shell__expand=2).id == a_run(directions, protocol__shell__expand=2.0).id


@pytest.mark.parametrize(("width", "expand", "inner"), [(768, 1.5, 1152), (10, 1.1, 11), (32, 2.0, 64), (3, 1 / 3, 1)])
def test_inner_width_is_the_whole_product(width, expand, inner):
    assert inner_width(width, expand) == inner
    with pytest.raises(Refusal, match="must be a whole number"):
        inner_width(width, expand + 0.01)


def test_heads_are_counted_against_the_inner_width():
    run = a_run("concat", protocol__shell__expand=1.5)
    task_grant = registry.grant(run, built(run, "meta")[1], registry.mixer_args(run))
    assert (task_grant.heads, task_grant.head_width) == (2, 24)
    with pytest.raises(Refusal, match=r"mixer.heads=5 does not fit 'dense' at inner width 48; allowed: 1, 2, 3, 4, 6"):
        registry.check(make_run("quick_recall", "dense", {"mixer.heads": 5, "protocol.shell.expand": 1.5}, 0, 0))


@pytest.mark.parametrize("directions", TWO)
def test_each_direction_is_calibrated_and_counted(directions, where):
    run = a_run(directions, protocol__shell__gain=0.5, protocol__backbone__layers=2)
    ready = build(run, where, "cpu")
    gains = calibrated(ready, run)
    assert len(gains) == 4
    scales = [part for _, scale in ready.model.parts() for part in scale.flatten().unique().tolist()]
    assert scales == pytest.approx([0.5 / total for total, _ in gains])
    again = calibrated(ready, dataclasses.replace(run, protocol=a_run(directions).protocol))
    assert [total * s for (total, _), s in zip(again, scales, strict=True)] == pytest.approx([0.5] * 4, rel=1e-5)
    one = build(a_run("one", protocol__backbone__layers=2), where, "cpu").capacity
    assert (ready.capacity.flops, ready.capacity.state_per_head) == (2 * one.flops, one.state_per_head)
    assert ready.capacity.mixer_parameters == 2 * one.mixer_parameters


@pytest.mark.parametrize("mixer", ["semiseparable", "low_rank"])
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_two_steps_on_recall_end_in_a_record(directions, mixer, where):
    record = execute(
        a_run(directions, mixer, **{k.replace(".", "__"): v for k, v in QUICK.items()}), where, lambda: False
    )
    assert record.outcome == "ok" and [step for step, _ in record.curve] == [1, 2]
    assert len(record.gain) == (1 if directions == "one" else 2)
    assert record.run["protocol"]["shell"]["directions"] == directions


@pytest.mark.parametrize("directions", TWO)
def test_every_parameter_gets_a_gradient(directions):
    model = a_model(directions, "vandermonde").train()
    model(rows([LENGTH, 7], LENGTH)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if "shell" in n and not p.grad.any()] == []


@pytest.mark.parametrize("directions", TWO)
def test_a_child_starts_from_its_parents_weights_and_scales(directions, tmp_path):
    child = a_run(directions, protocol="mini_sst2")
    assert child.parent.protocol.shell.directions == directions
    above, below = (built(shrunk(run))[0] for run in (child.parent, child))
    for _, scale in above.parts():
        scale.fill_(0.25)
    backbone.initialise(below, Streams(5, 0), 0)
    load_parent(below, above.state_dict(), child)
    assert all(float(scale.min()) == float(scale.max()) == 0.25 for _, scale in below.parts())
    values = dict(above.named_parameters())
    trunk = [(n, p) for n, p in below.named_parameters() if n.startswith("layers.")]
    assert trunk and all(torch.equal(p, values[n]) for n, p in trunk)


@pytest.mark.parametrize("directions", TWO)
def test_a_layer_is_one_graph(directions):
    layer, x = a_model(directions, order=ORDERS["misaligned"]).layers[0], hidden_inputs()
    segments = torch.ones(x.shape[:2], dtype=torch.int64)
    torch._dynamo.reset()  # else what other tests of this process compiled counts against the limit of recompilations
    graph = torch.compile(layer, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(graph(x, segments), layer(x, segments))

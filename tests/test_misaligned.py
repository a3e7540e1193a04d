"""`sam: misaligned`: features of another token of the same document, fixed by the seed, all else as with `sam: true`.

Axes: B batch, L length, K channels, n tokens of a document.
"""

import pytest
import torch

from bench import Refusal, registry
from bench.compose import choices, make_run
from bench.config import MISALIGNED
from bench.mixers.base import Features, misalign, sources
from bench.report.verb import report
from bench.run import execute
from bench.store import Store
from bench.sweep import grid, load, named
from tests.conftest import built

ROWS = torch.tensor(
    [[1] * 5 + [2] * 4 + [3] + [0] * 2, [1] * 12, [1] * 5 + [0] * 7, [1] * 4 + [2] * 5 + [0] * 3, [0] * 12]
)
SEED = torch.tensor(2**61 + 12345)


def of_length(n: int, seed: torch.Tensor) -> list[int]:
    return sources(torch.ones(1, n, dtype=torch.int64), seed)[0].tolist()


@pytest.mark.parametrize("seed", [torch.tensor(0), torch.tensor(1), SEED], ids=int)
def test_sources_of_a_document_depend_on_its_length_and_the_seed_alone(seed):
    """Not on the padding after it, its row's other documents, its place in the row, or the row's length."""
    found = sources(ROWS, seed)
    for row, sources_L in zip(ROWS, found, strict=True):
        assert sources_L[row == 0].tolist() == torch.arange(12)[row == 0].tolist()
        for number in range(1, int(row.max()) + 1):
            (places,) = (row == number).nonzero(as_tuple=True)
            assert (sources_L[places] - places[0]).tolist() == of_length(len(places), seed)
    assert torch.equal(sources(ROWS[:, :9], seed)[0], found[0, :9])


@pytest.mark.parametrize("n", [1, 2, 3, 50, 3000])
def test_sources_are_one_cycle_so_that_no_token_keeps_its_own(n):
    source, at, seen = of_length(n, SEED), 0, []
    for _ in range(n):
        seen.append(at)
        at = source[at]
    assert at == 0 and sorted(seen) == list(range(n))


def test_sources_differ_between_seeds_and_leave_no_trace_of_the_order():
    """Each distance occurs as often as in a shuffled document, for neighbouring seeds as for others."""
    n, seeds = 16, 2000
    lags = torch.tensor([of_length(n, torch.tensor(seed)) for seed in range(seeds)]) - torch.arange(n)
    for lag in (-4, -2, -1, 1, 2, 4):
        expected = (n - abs(lag)) / (n * (n - 1))
        assert float((lags == lag).double().mean()) == pytest.approx(expected, rel=0.1)
    assert len({tuple(of_length(n, torch.tensor(seed))) for seed in range(seeds)}) == seeds


def test_misalign_moves_every_kind_of_feature_alike():
    draw = torch.Generator().manual_seed(0)
    features = Features(*(torch.randn(len(ROWS), 12, k, generator=draw) for k in (3, 0, 2)))
    moved = misalign(features, ROWS, SEED)
    for x, y in zip(features, moved, strict=True):
        expected = torch.stack([row[source] for row, source in zip(x, sources(ROWS, SEED), strict=True)])
        assert y.dtype == x.dtype and torch.equal(y, expected)


def test_sources_are_one_graph_without_a_value_that_the_host_waits_for():
    graph = torch.compile(lambda segments_BL: sources(segments_BL, SEED), backend="eager", fullgraph=True)
    assert torch.equal(graph(ROWS), sources(ROWS, SEED))


# The level, from a command line to a table -------------------------------------------------------------------------


def a_run(level, mixer: str = "low_rank", protocol: str = "quick_recall", seed: int = 0, replica: int = 0):
    return make_run(protocol, mixer, {"mixer.sam": level, "mixer.heads": 2}, seed, replica)


@pytest.mark.parametrize("name", [n for n in choices("mixer") if True in registry.mixer_class(n).levels])
def test_a_misaligned_arm_has_the_parameters_of_the_aligned_one_and_another_output(name):
    (one, task), (two, _) = (built(a_run(level, name)) for level in (True, MISALIGNED))
    values = dict(two.named_parameters())
    assert list(values) == [n for n, _ in one.named_parameters()]
    assert all(torch.equal(values[n], p) for n, p in one.named_parameters())
    batch = task.example(4)
    assert not torch.allclose(one(batch), two(batch))


@pytest.mark.parametrize("name", ["low_rank", "attention"])
def test_the_matrix_of_a_misaligned_arm_is_the_aligned_one_with_rows_and_columns_moved(name):
    """M' = P M P^T, P_ij = 1 where token i takes its features from token j."""
    (one, task), (two, _) = (built(a_run(level, name)) for level in (True, MISALIGNED))
    batch = task.example(2)
    segments_BL = batch["segments"].clone()
    segments_BL[:, 17:] = 0
    x_BLD = one.embedding(batch)
    inputs = [model.layers[0].shell.mixer_inputs(x_BLD, segments_BL)[1:] for model in (one, two)]
    m, moved = (one.layers[0].shell.mixer.matrix(v, features, segments_BL) for v, features in inputs)
    assert torch.equal(inputs[0][0], inputs[1][0])  # v is never moved
    p_BLL = torch.nn.functional.one_hot(sources(segments_BL, two.layers[0].shell.order)).to(m)
    torch.testing.assert_close(moved, p_BLL[:, None] @ m @ p_BLL.mT[:, None])
    assert not torch.allclose(moved, m)


def test_the_order_is_the_seeds_and_a_childs_is_its_parents():
    child = a_run(MISALIGNED, protocol="mini_sst2", replica=3)
    orders = [registry.order(r) for r in (child, child.parent, a_run(MISALIGNED), a_run(MISALIGNED, "attention"))]
    assert orders == [orders[0]] * 4 and isinstance(orders[0], int)
    assert registry.order(a_run(MISALIGNED, seed=1)) != orders[0]
    assert registry.order(a_run(True)) is None and registry.order(a_run(False)) is None
    assert {int(layer.shell.order) for layer in built(child)[0].layers} == set(orders)


@pytest.mark.parametrize(
    ("name", "level", "message"),
    [
        ("dense", MISALIGNED, "mixer 'dense' has no form with sam=misaligned; it has: sam=false$"),
        ("low_rank", "misalinged", "has no form with sam=misalinged; it has: sam=false, sam=true, sam=misaligned$"),
        ("decay_attention", "false", "has no form with sam=false; it has: sam=true, sam=misaligned$"),
        ("low_rank", 1, "mixer.sam must be of type bool, got 1"),
    ],
)
def test_levels_that_do_not_exist_are_refused_with_those_that_do(name, level, message):
    with pytest.raises(Refusal, match=message):
        registry.check(a_run(level, name))


def test_a_misaligned_arm_is_a_run_of_its_own_and_leaves_the_ids_of_the_others():
    assert len({a_run(level).id for level in (True, False, MISALIGNED)}) == 3
    assert [named(a_run(level)).split()[1] for level in (True, False, MISALIGNED)] == ["sam", "not", "misaligned"]


SWEEP = """
question: What of the gain is alignment?
protocols: [quick_recall]
mixers: [{name: low_rank, heads: 2, sam: [false, true, misaligned]}]
seeds: [0, 1]
replicas: [0]
varies: {budget.steps: [2], budget.batch: [4], task.held_out: [8]}
departures: []
columns: [{protocol: quick_recall, metric: accuracy}]
family:
  {reference: {}, comparisons: [sam], primary: {protocol: quick_recall, metric: accuracy}, margin: 0.02, alpha: 0.05}
"""


def test_a_sweep_with_the_level_trains_and_its_report_shows_it(tmp_path, where):
    (tmp_path / "levels.yaml").write_text(SWEEP)
    sweep, store = load(tmp_path / "levels.yaml"), Store(tmp_path / "results")
    records = [execute(r, where, lambda: False) for r in grid(sweep)]
    assert {r.outcome for r in records} == {"ok"}
    assert len({r.hashes.shared_init for r in records}) == 2  # one a seed
    assert records[1].capacity == records[2].capacity and records[1].metrics["loss"] != records[2].metrics["loss"]
    table, csv, figure, *_ = report(sweep, store, tmp_path / "out", None)
    wide = table.read_text().split("\n## ")[0]
    cells = [line.split("|")[1:3] for line in wide.splitlines() if line.startswith("| low_rank")]
    assert [[c.strip() for c in line] for line in cells] == [
        ["low_rank", level] for level in ("no", "yes", "misaligned")
    ]
    assert [line.split(",")[:3] for line in csv.read_text().splitlines()[1:]] == [
        ["low_rank", "low_rank", "false"],
        ["low_rank SAM", "low_rank", "true"],
        ["low_rank misaligned", "low_rank", "misaligned"],
    ]
    assert figure.stat().st_size

"""Tuning: points that repeat, selection from records, held-out examples, equal budgets, whole sweeps with faults."""

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from bench import Refusal, cli, tune
from bench.compose import ROOT, compose_group, make_run, make_where
from bench.config import Run, with_point
from bench.plan.costs import longest, makespan
from bench.plan.graph import Node
from bench.plan.verb import plan
from bench.queue import Queue
from bench.report.tuning_text import best_of
from bench.report.verb import report
from bench.run import results
from bench.space import Tune, points
from bench.status import Reader
from bench.store import Store
from bench.strict import build
from bench.sweep import grid, load, named, ordered
from bench.tasks.base import SELECTION
from bench.worker import Stop, work
from tests.standing import launcher, standing
from tests.test_slurm import case, same_science
from tests.test_store import a_record
from tests.virtual import wait

PROTOCOL = "quick_digits_tuned"
LR = {"key": "optimiser.lr", "scale": "log", "values": [0.003, 0.03], "step": 0}
# Four mixers, two trials each of six steps, one seed: seconds.
SMALL = {
    "question": "Which?",
    "protocols": [PROTOCOL],
    "mixers": [
        {"name": "identity", "heads": 2},
        *({"name": name, "heads": 2, "sam": True} for name in ("low_rank", "attention", "toeplitz")),
    ],
    "seeds": [0],
    "replicas": [0],
    "varies": {"tune.space": [[LR]], "tune.trials": [2], "tune.steps": [6], "budget.steps": [8]},
    "departures": [],
    "columns": [{"protocol": PROTOCOL, "metric": "accuracy"}],
    "family": {
        "reference": {},
        "comparisons": [],
        "primary": {"protocol": PROTOCOL, "metric": "accuracy"},
        "margin": 0,
        "alpha": 0.05,
    },
}


def a_tune(**changes) -> Tune:
    values = compose_group("protocol", PROTOCOL)["tune"] | changes
    return build(Tune, values, "protocol.tune")


def drawn(trials: int, seed: int, *space: dict) -> list[dict]:
    made = a_tune(sampler="quasi_random", trials=trials, seed=seed, space=list(space))
    return points(made, 0)


def a_run(mixer: str = "identity", **changes) -> Run:
    changes = {f"protocol.tune.{key}": value for key, value in changes.items()}
    return make_run(PROTOCOL, mixer, {"mixer.heads": 2, **changes}, 0, 0)


def write(folder: Path, **changes) -> Path:
    (folder / "tuned.yaml").write_text(yaml.safe_dump(SMALL | changes, sort_keys=False))
    return folder / "tuned.yaml"


# What a protocol may say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"space": [LR | {"key": "budget.steps"}]},
            "'budget.steps' is no key to tune for every mixer alike; allowed: opt",
        ),
        ({"space": [LR | {"key": "shell.expand"}]}, "'shell.expand' is no key to tune"),
        ({"space": [LR | {"values": [0.1]}]}, "needs two or more rising values, got [0.1]"),
        ({"space": [LR | {"values": [0.1, 0.01]}]}, "rising values"),
        ({"space": [LR | {"values": [0, 0.1]}]}, "its values must be above 0"),
        ({"space": []}, "needs 1 to 10 different keys, got: none"),
        ({"trials": 5}, "must be the size of the grid, 6, got 5"),
        ({"seed": 3}, "must be 0 with sampler grid"),
        ({"sampler": "random"}, "must be one of grid, quasi_random, tpe"),
        ({"sampler": "quasi_random"}, "needs its least and greatest value"),
        ({"sampler": "tpe", "space": [LR], "pruner": {"rungs": 2, "keep": 0.5}}, "must be 1 with sampler tpe"),
        ({"pruner": {"rungs": 2, "keep": 1.0}}, "must lie between 0 and 1"),
        ({"seeds": [1, 1]}, "different seeds"),
        ({"selection": {"metric": "loss", "goal": "least", "examples": 9}}, "goal must be one of min, max"),
        ({"steps": 1.5}, "protocol.tune.steps must be of type int"),
        ({"budget": 3}, "unknown key 'protocol.tune.budget'; allowed: space, trials, sampler"),
    ],
)
def test_what_is_no_tuning_is_refused(changes, message):
    with pytest.raises(Refusal) as caught:
        a_tune(**changes)
    assert message in str(caught.value)


def test_a_value_that_the_protocol_does_not_take_is_refused_before_any_trial():
    with pytest.raises(Refusal, match=r"schedule\.shape must be one of linear, cosine"):
        a_run(space=[{"key": "schedule.shape", "scale": "choice", "values": ["linear", "flat"], "step": 0}], trials=2)


def test_a_protocol_without_tuning_keeps_its_text_and_a_tuned_one_has_an_id_of_its_own():
    plain, tuned = make_run("quick_digits", "identity", {}, 0, 0), make_run(PROTOCOL, "identity", {}, 0, 0)
    assert '"tune"' not in plain.protocol.canonical and plain.point == {} and plain.trials == ()
    ids = {plain.protocol_id, tuned.protocol_id}
    ids |= {a_run(**change).protocol_id for change in ({"steps": 7}, {"seeds": [5]}, {"selection.examples": 50})}
    assert len(ids) == 5


def test_quasi_random_points_are_these_whatever_the_machine():
    """In ids of runs, so they may never change."""
    wide = LR | {"values": [0.001, 1.0]}
    batch = {"key": "budget.batch", "scale": "log", "values": [32, 256], "step": 32}
    golden = [(0.0115846, 32), (0.366337, 64), (0.065145, 160)]
    assert [tuple(p.values()) for p in drawn(3, 0, wide, batch)] == golden
    assert [tuple(p.values()) for p in drawn(2, 0, wide, batch)] == golden[:2]
    assert drawn(2, 0, wide, batch) != drawn(2, 1, wide, batch)
    shares = np.log([p["optimiser.lr"] for p in drawn(64, 5, wide)]) / np.log(0.001)
    assert np.histogram(shares, 8, (0, 1))[0].tolist() == [8] * 8  # as even as a sequence can be
    assert sorted(p["budget.batch"] for p in drawn(6, 0, batch)) == [32, 64, 96, 128, 192, 224]  # none twice
    with pytest.raises(Refusal, match="no 9 different points"):
        drawn(9, 0, batch)


def test_every_mixer_gets_the_same_trials_and_pruning_costs_every_mixer_the_same():
    changes = {"pruner.rungs": 3, "pruner.keep": 0.5, "seeds": [7, 8]}
    runs = {mixer: a_run(mixer, **changes) for mixer in ("identity", "low_rank")}
    tune = runs["identity"].protocol.tune
    assert tune.counts == [6, 3, 2] and tune.spent == 2 * (6 * 38 + 3 * 75 + 2 * 150)
    for run in runs.values():
        every = ordered([run])
        assert len(every) == 23 and sorted(str(r.point) for r in every[:12]) == sorted(map(str, points(tune, 0) * 2))
        assert [r.kind for r in every] == ["trial"] * 12 + ["rung 1"] * 6 + ["rung 2"] * 4 + ["selected"]
        assert sum(r.steps for r in every[:-1]) == tune.spent and every[-1].id == run.id
        assert {r.seed for r in every[:-1]} == {7, 8} and run.seed == 0
        last = [r for r in every if r.kind == "rung 2"]
        assert {t.kind for r in last for t in r.trials} == {"rung 1"} and len(last) == 4
    assert [r.point for r in ordered([runs["identity"]])] == [r.point for r in ordered([runs["low_rank"]])]


def test_a_trial_trains_its_values_for_its_steps_under_the_id_of_its_point():
    run = a_run()
    trial = run.trials[2]
    acting = with_point(trial, trial.point)
    assert (acting.protocol.optimiser.lr, acting.protocol.budget.steps) == (0.01, 150)
    assert trial.protocol.optimiser.lr == run.protocol.optimiser.lr and len({r.id for r in (*run.trials, run)}) == 7
    assert run.point == "selected" and "trial optimiser.lr=0.01" in named(trial)


def test_a_sweep_refuses_a_budget_of_ones_own_a_tuning_seed_and_a_mixers_own_key(tmp_path):
    own = LR | {"key": "mixer.rank", "scale": "linear", "values": [4, 8]}
    departure = {"mixer": {"name": "low_rank"}, "source": "a test"}
    for changes, message in (
        (
            {"departures": [departure | {"set": {"tune.trials": 3}}]},
            "'tune.trials' would give a mixer a budget of its own",
        ),
        ({"seeds": [0, 1000]}, "seed 1000 of the sweep is a tuning seed of quick_digits_tuned"),
        (
            {"mixers": SMALL["mixers"][1:2], "varies": SMALL["varies"] | {"tune.space": [[own]]}},
            "tunes mixer.rank: a mix",
        ),
    ):
        with pytest.raises(Refusal) as caught:
            grid(load(write(tmp_path, **changes)))
        assert message in str(caught.value)
    runs = grid(load(write(tmp_path, departures=[departure | {"set": {"tune.space": [own]}}])))
    assert [with_point(t, t.point).mixer.args["rank"] for t in runs[1].trials] == [4, 8]
    assert runs[0].trials[0].point == {"optimiser.lr": 0.003}


def test_too_large_a_selection_is_refused_before_anything_is_written(tmp_path):
    words = [f"where.results={tmp_path / 'results'}", "where.device=cpu"]
    path = write(tmp_path, varies=SMALL["varies"] | {"tune.selection.examples": [900]})
    with pytest.raises(Refusal, match="must be at most half of 1437"):
        cli.refuse_early(ordered(grid(load(path))), cli.where_of(words))
    assert not (tmp_path / "results").exists() or not list((tmp_path / "results").glob("runs/*"))


# Selection of a trial -----------------------------------------------------------------------------------------------


def put(store: Store, run: Run, loss: float | None, chosen=None) -> None:
    """A record of a trial with this selection loss, None: it diverged."""
    record = dataclasses.replace(
        a_record(0),
        id=run.id,
        run=json.loads(json.dumps(tune.resolved(run))),
        outcome="ok" if loss is not None else "diverged",
        metrics={} if loss is None else {"loss": loss, "accuracy": 1 - loss},
        curve=((run.steps, 1.0),),
        chosen=chosen,
    )
    store.finish(record, {})


def test_the_best_trial_is_taken_ties_go_to_the_first_and_losses_are_last(tmp_path):
    store, run = Store(tmp_path), a_run()
    for trial, loss in zip(run.trials, (0.5, None, 0.2, 0.2, 0.9), strict=False):
        put(store, trial, loss)
    with pytest.raises(RuntimeError, match="have not ended"):
        tune.settle(run, store)
    store.fail(run.trials[5].id, "oom", "no room")
    point = tune.settle(run, store)
    assert point.values == {"optimiser.lr": 0.01} and point.outcome == ""
    assert [outcome for _, outcome in point.chosen.trials] == ["ok", "diverged", "ok", "ok", "ok", "oom"]
    most = a_run(**{"selection.metric": "accuracy", "selection.goal": "max"})
    for trial, loss in zip(most.trials, (0.5, 0.1, 0.2, 0.2, 0.9, None), strict=True):
        put(store, trial, loss)
    assert tune.settle(most, store).values == {"optimiser.lr": 0.003}
    other = a_run(**{"selection.metric": "top1"})
    for trial in other.trials:
        put(store, trial, 1.0)
    with pytest.raises(Refusal, match="has no 'top1'; it has: accuracy, loss"):
        tune.settle(other, store)


def test_several_tuning_seeds_count_by_their_mean_and_one_that_fails_fails_the_trial(tmp_path):
    store, run = Store(tmp_path), a_run(seeds=[7, 8])
    losses = ((0.1, 0.9), (0.4, 0.4), (0.1, None), (0.6, 0.6), (0.5, 0.5), (0.5, 0.5))
    for trial, loss in zip(run.trials, (one for pair in losses for one in pair), strict=True):
        put(store, trial, loss)
    assert tune.settle(run, store).values == {"optimiser.lr": 0.003}


def test_rungs_go_on_with_the_best_and_a_place_without_a_trial_is_a_loss(tmp_path):
    store, run = Store(tmp_path), a_run(**{"pruner.rungs": 2, "pruner.keep": 0.5})
    first = run.trials[0].trials
    for trial, loss in zip(first, (0.5, 0.3, None, None, None, None), strict=True):
        put(store, trial, loss)
    found = [tune.settle(place, store) for place in run.trials]
    assert [p.values for p in found] == [{"optimiser.lr": 0.003}, {"optimiser.lr": 0.001}, {}]
    assert found[2].outcome == "diverged" and "all but 2 trials of its tuning failed: 4 diverged" in found[2].reason
    for place, point, loss in zip(run.trials, found, (0.2, 0.1, None), strict=True):
        put(store, place, loss, point.chosen)
    assert tune.settle(run, store).values == {"optimiser.lr": 0.001}


def test_a_rerun_waits_for_its_trials_and_is_given_up_with_all_of_them(tmp_path):
    store, run = Store(tmp_path), a_run()
    queue = Queue(ordered([run]), store, make_where({"where.retries": 0}))
    for trial in run.trials[:-1]:
        assert not queue.ready(run)
        store.fail(trial.id, "error", "x")
    assert not queue.ready(run) and not queue.settled(run)
    store.fail(run.trials[-1].id, "error", "x")
    assert queue.settled(run) and not store.has(run.id)
    put(store, run.trials[3], 0.5)
    again = Queue(ordered([run]), Store(tmp_path), make_where({"where.retries": 0}))
    assert again.ready(run) and not again.settled(run)


# TPE ----------------------------------------------------------------------------------------------------------------

TPE_SPACE = {"sampler": "tpe", "space": [LR | {"values": [0.001, 1.0]}], "trials": 8}


def test_optuna_is_asked_once_a_trial_and_its_journal_is_made_again_from_the_records(tmp_path):
    store, run = Store(tmp_path), a_run(**TPE_SPACE)
    assert [t.point for t in run.trials] == [{"trial": n} for n in range(8)]

    def go(trial: Run) -> float:
        tune.ask(trial, store)
        point = tune.settle(trial, store)
        tune.ask(trial, store)  # as one who goes on after a killed worker would
        assert tune.settle(trial, store) == point
        return point.values["optimiser.lr"]

    for trial in run.trials[:4]:
        rate = go(trial)
        put(store, trial, abs(np.log(rate / 0.01)), tune.settle(trial, store).chosen)
    folder = tune.folder_of(run.trials[0], store)
    for path in folder.glob("*"):  # all that is not a record is lost
        path.unlink()
    rates = [go(trial) for trial in run.trials[4:6]]
    assert all(0.001 <= rate <= 1 for rate in rates)
    (folder / "journal.log").write_text('{"half')  # a writer that was killed
    (folder / "journal.sound").unlink()
    go(run.trials[6])
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    storage = JournalStorage(JournalFileBackend(str(folder / "journal.log")))
    study = optuna.load_study(study_name="trials", storage=storage)
    states = {t.user_attrs["trial"]: t.state.name for t in study.trials}
    assert states == {n: "COMPLETE" if n < 4 else "RUNNING" for n in range(7)}
    other = a_run("low_rank", **TPE_SPACE)
    tune.ask(other.trials[0], store)  # what is drawn before anything is known is the same for every mixer
    first = store.record(run.trials[0].id).chosen.point
    assert tune.settle(other.trials[0], store).values == first


def asks(folder: Path, trials: list[int], dies: int | None) -> None:
    """Values and a record for each of these trials; before trial `dies` killed, with the right to ask in hand."""
    store, run = Store(folder), a_run(**TPE_SPACE)
    for number in trials:
        if number == dies:
            tune._ask = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        tune.ask(run.trials[number], store)
        settled = tune.settle(run.trials[number], store)
        put(store, run.trials[number], abs(settled.values["optimiser.lr"] - 0.01), settled.chosen)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of a fork beside threads; ours hold no lock
def test_several_workers_ask_at_once_and_one_is_killed_meanwhile(tmp_path):
    """Every trial gets values once; whoever was killed is replaced by another one who goes on."""
    tasks = [([0, 3, 6], None), ([1, 4, 7], 4), ([2, 5], None)]
    for several in (tasks, [([4, 7], None)]):
        workers = [multiprocessing.get_context("fork").Process(target=asks, args=(tmp_path, *task)) for task in several]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(300)
        ends = [worker.exitcode for worker in workers]
        assert ends == [-signal.SIGKILL if dies else 0 for _, dies in several]
    store, run = Store(tmp_path), a_run(**TPE_SPACE)
    rates = [store.record(trial.id).chosen.point["optimiser.lr"] for trial in run.trials]
    assert len(set(rates)) == 8 and all(0.001 <= rate <= 1 for rate in rates)
    assert tune.settle(run, store).values["optimiser.lr"] == min(rates, key=lambda rate: abs(rate - 0.01))


def test_working_does_not_load_optuna():
    code = "import bench.worker, bench.tune, bench.cli, bench.report.verb, sys; print('optuna' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# Whole sweeps -------------------------------------------------------------------------------------------------------


def here(path: Path, folder: Path, reverse: bool = False) -> Store:
    """The sweep in this process, its trials in either order."""
    where = make_where({"where.results": str(folder), "where.device": "cpu"})
    runs = ordered(grid(load(path)))
    work(Queue(runs[::-1] if reverse else runs, Store(results(where)), where), Stop(float("inf")))
    return Store(results(where))


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> tuple[Path, Store]:
    folder = tmp_path_factory.mktemp("once")
    path = write(folder)
    return path, here(path, folder / "results")


def require_budget(path: Path, store: Store) -> None:
    """Each arm exactly its trials, each with the steps it is due; reruns at the best of them; data apart."""
    import pyarrow.parquet as pq

    for run in grid(load(path)):
        rerun, trials = store.record(run.id), [store.record(t.id) for t in run.trials]
        assert len(trials) == 2 and all(t.outcome == "ok" and t.curve[-1][0] == 6 for t in trials)
        best = min(trials, key=lambda t: t.metrics["loss"])
        assert rerun.chosen.point == best.run["point"] and rerun.run["point"] == "selected"
        assert rerun.chosen.trials == tuple((t.id, "ok") for t in trials) and rerun.curve[-1][0] == 8
        assert not store.weights(trials[0].id).exists() and store.weights(rerun.id).exists()
        items = {r.id: pq.read_table(store.folder(r.id) / "items.parquet") for r in (rerun, *trials)}
        selection, reported = (set(items[i]["item"].to_pylist()) for i in (trials[0].id, rerun.id))
        assert set(items[trials[1].id]["item"].to_pylist()) == selection and len(selection) == 200
        assert not selection & reported and set(items[trials[0].id]["part"].to_pylist()) == {SELECTION}


def test_a_tuned_sweep_through_two_workers_one_of_them_killed_is_that_of_one_process(once, tmp_path):
    path, alone = once
    words = ["sweep", str(path), "--workers", "2", f"where.results={tmp_path / 'results'}", "where.device=cpu"]
    command = [*launcher(standing(tmp_path, 3)), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    store = Store(tmp_path / "results")
    runs = ordered(grid(load(path)))
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        owner = wait(lambda: next((o for r in runs if (o := store.owner(r.id))), None), 300)
        os.kill(owner["pid"], signal.SIGKILL)
        (tmp_path / "go").touch()
        said = process.communicate(timeout=300)[0].decode()
    assert process.returncode == 1 and "ended with exit code -9" in said
    assert all(same_science(store.record(run.id), alone.record(run.id)) for run in runs)
    assert [store.record(run.id).chosen for run in runs] == [alone.record(run.id).chosen for run in runs]
    require_budget(path, store)


@pytest.mark.slurm
def test_a_tuned_sweep_on_slurm_with_a_worker_killed_is_that_of_one_process(virtual, once, tmp_path):
    path, alone = once
    own = {key: SMALL[key] for key in ("protocols", "mixers", "seeds", "varies", "columns")}
    asked = case(tmp_path, {"pack": 6, "container": [str(standing(tmp_path, 3))]}, **own)
    assert [r.id for r in asked.runs] == [r.id for r in ordered(grid(load(path)))]
    asked.submit()
    owner = wait(lambda: next((o for r in asked.runs if (o := asked.store.owner(r.id))), None), 300, asked.logs)
    os.kill(owner["pid"], signal.SIGKILL)
    (tmp_path / "go").touch()
    asked.finished()
    pairs = [(asked.store.record(r.id), alone.record(r.id)) for r in asked.runs]
    assert all(same_science(*pair) for pair in pairs) and [a.chosen for a, _ in pairs] == [b.chosen for _, b in pairs]
    require_budget(path, asked.store)


def test_the_report_shows_choices_and_refuses_unequal_budgets(once, tmp_path):
    path, store = once
    sweep = load(path)
    report(sweep, store, tmp_path / "out", None)
    text = (tmp_path / "out" / "table.md").read_text()
    for title in ("## Tuning of", "## Response of", "## Best of k trials", "## What tuning did to the order"):
        assert title in text
    assert (
        tmp_path / "out" / "figures" / "tuning.pdf"
    ).stat().st_size > 5000 and "(edge)" in text  # of two values both are edges
    proof = json.loads((tmp_path / "out" / "certificate.json").read_text())["tuning"]
    assert all(arm["steps"] == 12 and len(arm["trials"]) == 2 for arms in proof.values() for arm in arms.values())
    runs = grid(sweep)
    odd = copied(store, runs, tmp_path / "odd", [runs[2].trials[1].id], {})
    assert (
        "tuning budgets differ: identity 2 trials of 12 steps, low_rank SAM 2 trials of 12 steps, attention SAM 1 "
        in refused(sweep, odd)
    )
    cut = {runs[1].trials[0].id: {"curve": ((3, 1.0),)}}
    assert "low_rank SAM 2 trials of 9 steps" in refused(sweep, copied(store, runs, tmp_path / "cut", [], cut))
    worse = max(runs[0].trials, key=lambda t: store.record(t.id).metrics["loss"])
    better = {worse.id: {"metrics": {"loss": 0.0, "accuracy": 1.0}}}
    assert "of identity took" in refused(sweep, copied(store, runs, tmp_path / "better", [], better))


def test_a_trial_that_was_given_up_elsewhere_is_the_loss_that_its_rerun_noted(once, tmp_path):
    path, store = once
    run = grid(load(path))[2]
    lost = max(run.trials, key=lambda t: store.record(t.id).metrics["loss"])
    noted = tuple((i, "oom" if i == lost.id else o) for i, o in store.record(run.id).chosen.trials)
    chosen = dataclasses.replace(store.record(run.id).chosen, trials=noted)
    there = copied(store, grid(load(path)), tmp_path / "x", [lost.id], {run.id: {"chosen": chosen}})
    report(load(path), there, tmp_path, None)
    text = (tmp_path / "table.md").read_text()
    assert "1 oom" in text


def test_plan_and_status_know_the_trials(once, tmp_path):
    path, store = once
    where = make_where({"where.results": str(tmp_path), "where.device": "cpu"})
    fresh = plan(load(path), Store(tmp_path), 2, 2, "")
    assert [(row.runs, row.protocol.endswith(" trials")) for row in fresh.rows] == [(8, True), (4, False)]
    runs = ordered(grid(load(path)))
    nodes = [Node(run, "missing", 1.0, "", True) for run in runs]
    seconds = {run.id: 1.0 if run.is_trial else 10.0 for run in runs}
    assert longest(nodes, seconds) == 11 and makespan(nodes, seconds, 8) == 11 and makespan(nodes, seconds, 2) == 24
    done = plan(load(path), store, 2, 2, "")
    assert done.states["done"] == 12 and Reader(path, where, store.root, False).look().of("ok")[0].run.is_trial
    for trial in runs[-1].trials:
        for _ in range(3):
            Store(tmp_path).fail(trial.id, "oom", "no room")
    states = {s.run.id: s for s in Reader(path, where, tmp_path, False).look().states}
    assert states[runs[-1].id].name == "given up" and "all its trials, like" in states[runs[-1].id].why
    assert plan(load(path), Store(tmp_path), 2, 2, "").states["failed"] == 3


def copied(store: Store, runs: list[Run], root: Path, without: list[str], changed: dict[str, dict]) -> Store:
    made = Store(root)
    for run in ordered(runs):
        if run.id not in without:
            made.finish(dataclasses.replace(store.record(run.id), **changed.get(run.id, {})), {})
    return made


def refused(sweep, store: Store) -> str:
    with pytest.raises(Refusal) as caught:
        report(sweep, store, store.root / "out", None)
    assert not (store.root / "out").exists()
    return str(caught.value)


def test_an_arm_whose_every_trial_diverges_appears_as_such(tmp_path):
    wild = {"mixer": {"name": "toeplitz"}, "set": {"tune.space": [LR | {"values": [1e30, 1e31]}]}, "source": "a test"}
    path = write(tmp_path, mixers=[SMALL["mixers"][0], SMALL["mixers"][3]], departures=[wild])
    store = here(path, tmp_path / "results", reverse=True)
    rerun = store.record(grid(load(path))[1].id)
    assert rerun.outcome == "diverged" and rerun.reason == "every trial of its tuning failed: 2 diverged"
    report(load(path), store, tmp_path / "out", None)
    text = (tmp_path / "out" / "table.md").read_text()
    assert "1 of 1 failed (1 diverged)" in text and "every trial of its tuning failed: 2 diverged" in text
    assert "no trial came out" in text and "tune.space" in text


def test_the_expected_best_of_k_is_the_mean_over_all_subsets():
    from itertools import combinations

    scores = [0.4, 0.1, 0.7, 0.2, 0.2]
    for k in range(1, 6):
        assert best_of(scores, 1, k) == pytest.approx(np.mean([min(s) for s in combinations(scores, k)]))
        assert best_of(scores, -1, k) == pytest.approx(np.mean([max(s) for s in combinations(scores, k)]))

"""The sweep grammar (which runs, in which order, what is refused) and the queue that works through them."""

import dataclasses
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from bench import Refusal, compose, launch, sweep, worker
from bench.compose import make_run
from bench.config import resolved
from bench.queue import Queue
from bench.store import Store
from bench.sweep import cells, grid, load, named, ordered, work_of
from bench.worker import Stop, work
from tests.conftest import forget
from tests.test_store import a_record

ROOT = Path(__file__).parents[1]
PLAIN = {
    "question": "Which?",
    "protocols": ["quick_copying"],
    "mixers": [{"name": "identity", "heads": 2}],
    "seeds": [0],
    "replicas": [0],
    "varies": {"budget.steps": [2]},
    "departures": [],
    "columns": [{"protocol": "quick_copying", "metric": "accuracy"}],
    "family": {
        "reference": {},
        "comparisons": [],
        "primary": {"protocol": "quick_copying", "metric": "accuracy"},
        "margin": 0,
        "alpha": 0.05,
    },
}


def sweep_file(folder: Path, **changes) -> Path:
    """A sweep file; its one column is of its first protocol unless `columns` says otherwise, and its primary outcome is
    its first column unless `family` does."""
    if isinstance(given := changes.get("protocols"), list) and given:
        changes = {"columns": [{"protocol": given[0], "metric": "accuracy"}]} | changes
    if changes.get("columns"):
        changes = {"family": PLAIN["family"] | {"primary": changes["columns"][0]}} | changes
    (folder / "x.yaml").write_text(yaml.safe_dump(PLAIN | changes, sort_keys=False))
    return folder / "x.yaml"


def a_sweep(folder: Path, **changes) -> sweep.Sweep:
    return load(sweep_file(folder, **changes))


def refusal(call, *arguments, **keys) -> str:
    with pytest.raises(Refusal) as caught:
        call(*arguments, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """Configs with 'base' (two steps of quick_copying), its 'child' and 'other', and a 'grandchild' of 'child'."""
    configs = tmp_path / "configs"
    for file in (ROOT / "configs").rglob("*.yaml"):
        target = configs / file.relative_to(ROOT / "configs")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(file.read_text())
    for n, (name, init) in enumerate((("base", '""'), ("child", "base"), ("other", "base"), ("grandchild", "child"))):
        own = f"init: {init}\ntask: {{held_out: {64 + n}}}\nbudget: {{steps: 2}}\n"
        text = f"defaults:\n  - quick_copying\n  - _self_\n{own}"
        (configs / "protocol" / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(compose, "CONFIGS", configs)
    forget()
    yield
    forget()


# Grammar ------------------------------------------------------------------------------------------------------------


def test_runs_come_seed_by_seed_and_each_chain_depth_first(chain, tmp_path):
    mixers = [{"name": "identity", "heads": 2}, {"name": "low_rank", "heads": 2, "sam": [False, True]}]
    protocols = ["other", "grandchild", "base", "child"]
    runs = ordered(grid(a_sweep(tmp_path, mixers=mixers, protocols=protocols, seeds=[1, 0], varies={})))
    assert [r.seed for r in runs] == [0] * 12 + [1] * 12
    assert [r.label for r in runs] == ["base", "other", "child", "grandchild"] * 6
    for start in range(0, 24, 4):
        assert len({(r.seed, str(r.mixer)) for r in runs[start : start + 4]}) == 1


@pytest.mark.parametrize("name", ["runs", "logs", "slurm", "show", "tune"])
def test_a_sweep_has_no_name_that_results_folders_have_taken(tmp_path, name):
    (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(PLAIN))
    assert f"something else under '{name}'" in refusal(load, tmp_path / f"{name}.yaml")


def test_the_mini_chain_is_trained_arm_by_arm():
    runs = ordered(grid(load(ROOT / "sweeps" / "mini_text.yaml")))
    names = ["mini_mlm", "mini_sst2", "mini_cola", "mini_mnli_small", "mini_mrpc"]
    assert [r.label for r in runs] == names * 5
    assert [r.mixer.name for r in runs[::5]] == ["attention", "low_rank", "toeplitz", "quasiseparable", "identity"]


def test_parents_are_added_once_and_replicas_are_for_children_only(chain, tmp_path):
    asked = a_sweep(tmp_path, protocols=["grandchild", "base"], replicas=[0, 1, 2], varies={})
    assert [(r.label, r.replica) for r in grid(asked)] == [*(("grandchild", n) for n in range(3)), ("base", 0)]
    runs = ordered(grid(asked))
    leaves = [("grandchild", n) for n in range(3)]
    assert [(r.label, r.replica) for r in runs] == [("base", 0), ("child", 0), *leaves]
    assert len({r.id for r in runs}) == 5
    assert {r.parent.id for r in runs[2:]} == {runs[1].id}


def test_an_arm_listed_twice_is_one(tmp_path):
    twice = a_sweep(tmp_path, mixers=PLAIN["mixers"] * 2)
    assert len(grid(twice)) == 1 and len(ordered(grid(twice))) == 1


def test_varies_and_departures_make_protocols_of_their_own(tmp_path):
    departure = {"mixer": {"name": "low_rank", "sam": True}, "set": {"backbone.width": 40}, "source": "issue 1"}
    mixers = [{"name": "identity", "heads": 2}, {"name": "low_rank", "heads": 2, "sam": [True, False]}]
    varies = {"task.offset": [4, 8], "budget.steps": [2]}
    family = FAMILY | {"primary": {"protocol": "quick_copying[task.offset=8,budget.steps=2]", "metric": "accuracy"}}
    found = cells(a_sweep(tmp_path, mixers=mixers, varies=varies, departures=[departure], family=family))
    labels = [f"quick_copying[task.offset={offset},budget.steps=2]" for offset in (4, 8)]
    assert [c.protocol for c in found] == labels * 3
    for c in found:
        protocol = c.run.protocol
        departs = c.run.mixer.name == "low_rank" and c.run.mixer.args["sam"]
        assert protocol.budget.steps == 2
        assert protocol.backbone.width == (40 if departs else 32)
        assert protocol.task.args["offset"] == c.variation["protocol.task.offset"]
        assert c.arm.departed == ({"protocol.backbone.width": 40} if departs else {})
    assert len({c.run.protocol_id for c in found}) == 4 and len({c.run.id for c in found}) == 6
    plain = make_run("quick_copying", "identity", {"mixer.heads": 2}, 0, 0)
    assert plain.protocol_id not in {c.run.protocol_id for c in found}


def test_a_departure_matches_what_the_sweep_leaves_as_the_mixer_has_it(tmp_path):
    """sam is true in the yaml of low_rank; the report matches departures on the whole mixer, so must the sweep."""
    departure = {"mixer": {"name": "low_rank", "sam": True}, "set": {"backbone.width": 40}, "source": "issue 1"}
    (run,) = grid(a_sweep(tmp_path, mixers=[{"name": "low_rank", "heads": 2}], departures=[departure]))
    assert run.protocol.backbone.width == 40


def departing(mixer: dict, changes: dict | None = None, source: str = "issue 1", times: int = 1) -> dict:
    changes = {"backbone.width": 40} if changes is None else changes
    return {"departures": [{"mixer": mixer, "set": changes, "source": source}] * times}


NOWHERE = ["column 'quick_", "no such protocol", "it has: quick_copying[budget.steps=2]"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (departing({"name": "dense"}), ["no arm", "'dense'", "arms: identity sam=false heads=2"]),
        (departing({"name": "identity", "hds": 2}), ["no arm", "none has the key 'hds'", "keys: name, sam, heads"]),
        (departing({"name": "identity"}, {"widht": 8}), ["widht", "backbone"]),
        (departing({"name": "identity"}, {"init": "x"}), ["init"]),
        (departing({"name": "identity"}, {"budget.steps": 4}), ["departures", "budget.steps", "varies"]),
        (departing({}), ["departures: mixer, set and source", "'mixer': {}"]),
        (departing({"name": "identity"}, {}), ["departures: mixer, set and source", "'set': {}"]),
        (departing({"name": "identity"}, source=""), ["departures: mixer, set and source", "'source': ''"]),
        (departing({"name": "identity"}, times=2), ["two set 'backbone.width'", "identity sam=false heads=2"]),
        ({"departures": [{"mixer": {"name": "identity"}, "set": {}, "why": ""}]}, ["why", "source"]),
        ({"departures": None}, ["sweep.departures must be a list", "None"]),
        ({"varies": {"init": ["x"]}}, ["init"]),
        ({"varies": {"budget.stepz": [1]}}, ["stepz", "steps, batch"]),
        ({"varies": {"budget.steps": []}}, ["budget.steps", "empty"]),
        (
            {"varies": {"budget.steps": [1, 2]}},
            ["primary", "quick_copying[budget.steps=1], quick_copying[budget.steps=2]"],
        ),
        ({"varies": {"budget.stepz": [1, 2]}}, ["stepz", "steps, batch"]),
        ({"varies": {"budget.steps": [1, 2, 1.0]}}, ["sweep.varies.budget.steps lists a value twice", "1, 2, 1.0"]),
        ({"columns": [*PLAIN["columns"], {"protocol": "quick_digits", "metric": "loss"}]}, NOWHERE),
        ({"columns": [*PLAIN["columns"], {"protocol": "quick_copying[budget.steps=9]", "metric": "loss"}]}, NOWHERE),
        ({"varies": {"optimiser.lr": [float("nan")]}}, ["optimiser.lr", "finite"]),
        ({"mixers": [{"name": "vandermonde", "bound": float("inf")}]}, ["mixer.bound", "finite number, got inf"]),
        ({"varies": {"budget.steps": 3}}, ["budget.steps", "list"]),
        ({"lr": 1}, ["sweep.lr", "question, protocols, mixers, seeds, replicas, varies, departures, columns, family"]),
        ({"name": "other"}, ["sweep.name"]),
        ({"mixers": []}, ["sweep.mixers is empty"]),
        ({"mixers": [{"heads": 2}]}, ["needs a name"]),
        ({"mixers": [{"name": "mamba"}]}, ["mamba", "toeplitz"]),
        ({"mixers": [{"name": "identity", "heads": []}]}, ["identity.heads is empty"]),
        ({"mixers": [{"name": "identity", "rank": 2}]}, ["identity has no key 'rank'", "name, sam, heads, salt"]),
        ({"protocols": ["quick_copy"]}, ["quick_copy", "quick_copying"]),
        ({"protocols": ["quick_copying"] * 2}, ["sweep.protocols lists a value twice"]),
        ({"protocols": "quick_copying"}, ["sweep.protocols must be a list", "'quick_copying'"]),
        ({"replicas": [0, 0]}, ["sweep.replicas lists a value twice"]),
        ({"replicas": [1]}, ["sweep.replicas must list 0", "quick_copying"]),
        ({"seeds": [0, 1, 0]}, ["sweep.seeds lists a value twice", "0, 1, 0"]),
        ({"seeds": 3}, ["sweep.seeds must be a list", "3"]),
        ({"seeds": [True]}, ["seeds"]),
        ({"seeds": [-1]}, ["seed"]),
        ({"question": "${oc.env:HOME}"}, ["interpolation"]),
    ],
)
def test_what_a_sweep_may_not_say_is_one_line(tmp_path, changes, parts):
    message = refusal(lambda: grid(a_sweep(tmp_path, **changes)))
    assert all(part in message for part in parts), message


FAMILY = PLAIN["family"]
AGAINST = {**FAMILY, "reference": {"name": "identity"}, "comparisons": ["reference"]}


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {**FAMILY, "primary": {"protocol": "quick_copying", "metric": "acc"}},
            ["x.yaml: ", "has the metric 'acc'", "has: accuracy; both"],
        ),
        ({**FAMILY, "comparisons": ["all"]}, ["comparisons", "reference, sam"]),
        ({**FAMILY, "comparisons": ["reference"]}, ["reference names an arm"]),
        ({**FAMILY, "reference": {"name": "identity"}}, ["only then"]),
        (
            {**FAMILY, "primary": {"protocol": "quick_recall", "metric": "accuracy"}},
            ["not a column of", "it has: quick_copying x accuracy"],
        ),
        ({**FAMILY, "alpha": 1}, ["x.yaml: sweep.family.alpha"]),
        ({**FAMILY, "margin": -1}, ["x.yaml: sweep.family.margin"]),
        (
            {**AGAINST, "reference": {"name": "dense"}},
            ["'dense'", "no arm", "; arms: identity sam=false heads=4, low_rank sam=true heads=2"],
        ),
        ({**AGAINST, "reference": {"sam": False}}, ["2 arms match it", "; arms: identity heads=2, identity heads=4"]),
        (
            {**AGAINST, "reference": {"name": "low_rank", "rank": 8}},
            ["no arm", "; arms: identity sam=false heads=4, low_rank sam=true heads=2 rank=16"],
        ),
        ({**AGAINST, "reference": {"name": "identity", "hds": 4}}, ["'hds'", "keys: name, sam, heads, rank"]),
        ({k: v for k, v in FAMILY.items() if k != "alpha"}, ["sweep.family.alpha"]),
    ],
)
def test_what_a_family_may_not_say_is_one_line(tmp_path, changes, parts):
    mixers = [{"name": "identity", "heads": [2, 4, 4]}, {"name": "low_rank", "heads": 2, "sam": True}]
    mixers = mixers[:1] if changes.get("reference") == {"sam": False} else [{"name": "identity"}, mixers[1]]
    message = refusal(lambda: grid(a_sweep(tmp_path, family=changes, mixers=mixers)))
    assert all(part in message for part in parts), message


def test_what_was_declared_goes_with_every_run_and_its_parents_and_leaves_their_ids(chain, tmp_path):
    column = {"protocol": "grandchild", "metric": "accuracy"}
    changes = {"protocols": ["grandchild"], "columns": [column], "varies": {}}
    declared = a_sweep(tmp_path, **changes, family={**FAMILY, "primary": column})
    runs = ordered(grid(declared))
    assert len(runs) == 3 and {r.registration for r in runs} == {declared.registration}
    for key, value in {"margin": 0.5, "alpha": 0.1}.items():
        other = a_sweep(tmp_path, **changes, family={**FAMILY, "primary": column, key: value})
        assert other.registration != declared.registration
        assert [r.id for r in ordered(grid(other))] == [r.id for r in runs]
    more = a_sweep(tmp_path, **changes, family={**FAMILY, "primary": column}, seeds=[0, 1])
    assert more.registration != declared.registration and make_run("base", "identity", {}, 0, 0).registration == ""


@pytest.mark.parametrize(
    ("control", "parts"),
    [
        ({"name": "dense"}, ["'dense'", "no arm"]),
        ({"name": "identity", "hds": 4}, ["none has the key 'hds'", "keys: name, sam, heads"]),
        ({"heads": 4}, ["reference cannot be a control"]),
    ],
)
def test_a_control_is_an_arm_and_not_the_reference(tmp_path, control, parts):
    message = refusal(
        lambda: grid(a_sweep(tmp_path, family=AGAINST, mixers=[{"name": "identity"}], controls=[control]))
    )
    assert all(part in message for part in ["sweep.controls", *parts]), message


def test_controls_are_declared_and_change_no_id(tmp_path):
    mixers = [{"name": "identity"}, {"name": "low_rank", "sam": True, "heads": 2}]
    none, empty, one = (
        a_sweep(tmp_path, family=AGAINST, mixers=mixers, **given)
        for given in ({}, {"controls": []}, {"controls": [{"name": "low_rank"}]})
    )
    assert none.registration == empty.registration != one.registration
    assert [r.id for r in grid(none)] == [r.id for r in grid(one)]


def test_a_sweep_lacks_no_key(tmp_path):
    for key in PLAIN:
        (tmp_path / "y.yaml").write_text(yaml.safe_dump({k: v for k, v in PLAIN.items() if k != key}))
        assert f"sweep.{key}" in refusal(load, tmp_path / "y.yaml")
    for text in ("", "[1, 2]", "{{", "3"):
        (tmp_path / "y.yaml").write_text(text)
        assert str(tmp_path / "y.yaml") in refusal(load, tmp_path / "y.yaml")


def test_people_can_tell_arms_apart():
    names = {named(make_run("quick_copying", "low_rank", {"mixer.rank": r}, s, 0)) for r in (4, 8) for s in (0, 1)}
    assert len(names) == 4


# Queue --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def stop():
    """Nobody stops the work; the handlers of signals are put back afterwards."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield Stop(float("inf"))
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def queue(chain, tmp_path, where):
    """base -> child -> grandchild, and base -> other."""
    asked = a_sweep(tmp_path, protocols=["base", "child", "grandchild", "other"], varies={})
    return Queue(ordered(grid(asked)), Store(Path(where.results)), where)


def started(monkeypatch, outcome=lambda run: None) -> list[str]:
    """Labels of the runs that the worker trains from now on; `outcome` may raise in a run's place."""
    labels, execute = [], worker.execute

    def noted(run, where, stop):
        labels.append(run.label)
        outcome(run)
        return execute(run, where, stop)

    monkeypatch.setattr(worker, "execute", noted)
    return labels


def test_only_what_the_store_lacks_is_trained_and_lost_parents_come_back_untouched(queue, stop, monkeypatch):
    labels = started(monkeypatch)
    work(queue, stop)
    assert labels == ["base", "child", "grandchild", "other"]
    base, child, grandchild, other = queue.runs
    folder, results = queue.store.folder, queue.store
    whole = {r.id: (folder(r.id) / "record.json").read_bytes() for r in queue.runs}
    items = (folder(child.id) / "items.parquet").read_bytes()
    last = results.record(grandchild.id)

    labels.clear()
    for run in queue.runs:
        results.weights(run.id).unlink()
    work(queue, stop)
    assert labels == []  # nobody needs the weights

    (folder(grandchild.id) / "record.json").unlink()
    again = Queue(queue.runs, Store(results.root), queue.where)
    work(again, stop)
    assert labels == ["base", "child", "grandchild"]
    for run in (base, child, other):
        assert (folder(run.id) / "record.json").read_bytes() == whole[run.id]
    assert (folder(child.id) / "items.parquet").read_bytes() == items
    assert again.store.record(grandchild.id).metrics == last.metrics
    assert not any(results.leased(r.id) for r in queue.runs)


def test_a_run_that_raises_is_given_up_and_the_others_go_on(queue, stop, monkeypatch, capsys):
    def broken(run):
        if run.label == "child":
            raise ValueError("bad luck")

    labels = started(monkeypatch, broken)
    work(queue, stop)
    _, child, grandchild, other = queue.runs
    assert labels == ["base", "child", "child", "child", "other"]  # where.retries: 2
    notes = queue.store.failures(child.id)
    assert [n["kind"] for n in notes] == ["error"] * 3 and "ValueError: bad luck\nTraceback" in notes[0]["message"]
    assert queue.store.has(other.id) and not queue.store.has(child.id) and not queue.store.has(grandchild.id)
    assert not queue.store.folder(grandchild.id).exists()
    assert "bad luck" in capsys.readouterr().err
    work(queue, stop)
    assert len(labels) == 5


def test_a_parent_that_cannot_be_retrained_is_given_up_too(queue, stop, monkeypatch):
    """It has a record, but its weights are gone and training it again has failed as often as it may."""
    child = queue.runs[1]
    record = dataclasses.replace(a_record(0), id=child.id, run=resolved(child), protocol_id=child.protocol_id)
    queue.store.finish(record, {})
    for _ in range(3):
        queue.store.fail(child.id, "error", "bad luck")
    labels = started(monkeypatch)
    work(queue, stop)
    assert labels == ["base", "other"]


def test_running_out_of_memory_is_noted_as_such(queue, stop, monkeypatch):
    def broken(run):
        raise MemoryError

    started(monkeypatch, broken)
    work(queue, stop)
    assert {n["kind"] for n in queue.store.failures(queue.runs[0].id)} == {"oom"}


def test_a_refused_input_ends_the_worker_without_a_failure_or_a_lease(queue, stop, monkeypatch):
    def broken(run):
        raise Refusal("no data")

    started(monkeypatch, broken)
    with pytest.raises(Refusal):
        work(queue, stop)
    assert queue.store.failures(queue.runs[0].id) == [] and not queue.store.leased(queue.runs[0].id)


def test_damaged_weights_of_a_parent_end_the_worker_and_what_is_advised_helps(queue, stop):
    base, child, *_ = queue.runs
    record = worker.execute(base, queue.where, stop)
    weights = queue.store.weights(base.id)
    whole = weights.read_bytes()
    for text in (b"junk\n", whole[: len(whole) // 2], b""):
        weights.write_bytes(text)
        message = refusal(work, queue, stop)
        assert f"{weights} is damaged" in message
        assert f"restore it, or delete it and give the command again, which then trains run {base.id}" in message
        assert queue.store.failures(child.id) == [] and not queue.store.leased(child.id)
    weights.unlink()
    assert work(queue, stop) and all(queue.store.has(run.id) for run in queue.runs)
    assert queue.store.record(base.id) == record and weights.stat().st_size == len(whole)


def test_children_of_an_unfit_or_diverged_run_say_why(queue, stop):
    base, child, *_ = queue.runs
    record = dataclasses.replace(a_record(0, "diverged"), id=base.id, run=resolved(base), protocol_id=base.protocol_id)
    queue.store.finish(record, {})
    work(queue, stop)
    assert {queue.store.record(r.id).outcome for r in queue.runs} == {"diverged"}
    assert base.id in queue.store.record(child.id).reason


def test_nothing_starts_that_cannot_finish(queue, stop):
    base, child, *_ = queue.runs
    other = make_run("base", "identity", {"mixer.heads": 2}, 7, 0)
    own = {"id": other.id, "run": resolved(other), "protocol_id": base.protocol_id}
    record = dataclasses.replace(a_record(0, wall=600.0), **own)
    queue.store.finish(record, {})
    queue.runs.append(other)
    assert queue.expected_seconds(base) == 600 and queue.expected_seconds(child) == 0  # unknown
    stop.until = time.time() + 300
    begun = time.time()
    work(queue, stop)
    assert time.time() - begun < 30 and not queue.store.folder(base.id).exists()
    queue.store.open(base.id)
    (queue.store.folder(base.id) / "progress.json").write_text('{"step": 3, "steps": 4}')  # left by an interruption
    assert queue.expected_seconds(base) == 150
    taken, lease = queue.next(stop.until)
    assert taken.id == base.id
    lease.release()


def test_some_seeds_of_a_sweep_are_its_runs_of_these_seeds_and_what_they_need(chain, tmp_path):
    asked = a_sweep(tmp_path, protocols=["grandchild"], varies={}, seeds=[0, 1, 2])
    every = work_of(asked, None)
    assert every == ordered(grid(asked)) and {r.seed for r in every} == {0, 1, 2}
    some = work_of(asked, [2, 0])
    assert some == [r for r in every if r.seed != 1] and {r.label for r in some} == {"base", "child", "grandchild"}
    assert "--seeds 7 is none of" in refusal(work_of, asked, [0, 7]) and "0, 1, 2" in refusal(work_of, asked, [7])


def test_two_workers_of_a_sweep_keep_to_their_arms(chain, tmp_path, where):
    """What a process has compiled serves the next run of its arm only; with nothing of it left, the order decides."""
    mixers = [{"name": name, "heads": 2} for name in ("identity", "dft")]
    asked = a_sweep(tmp_path, mixers=mixers, protocols=["base", "other", "child"], varies={})
    runs = ordered(grid(asked))
    one, two = (Queue(runs, Store(Path(where.results)), where) for _ in range(2))
    first, second = one.next(float("inf")), two.next(float("inf"))
    assert [(r.label, r.mixer.name) for r, _ in (first, second)] == [("base", "identity"), ("base", "dft")]
    for run, lease in (first, second):
        finish(run, one)
        one.store.weights(run.id).touch()
        lease.release()
    taken = [queue.next(float("inf")) for queue in (two, one, two, one)]
    names = [(r.label, r.mixer.name) for r, _ in taken]
    assert names == [("other", "dft"), ("other", "identity"), ("child", "dft"), ("child", "identity")]
    assert one.next(float("inf")) is None
    for _, lease in taken:
        lease.release()


def finish(run, queue):
    queue.store.finish(dataclasses.replace(a_record(0), id=run.id, run=resolved(run), protocol_id=run.protocol_id), {})


def test_in_the_next_seed_a_worker_goes_on_with_arms_that_it_has_compiled(chain, tmp_path, where):
    """But it begins no seed before the one before it has no run left."""
    mixers = [{"name": name, "heads": 2} for name in ("identity", "dft", "monarch", "dense")]
    asked = a_sweep(tmp_path, mixers=mixers, protocols=["base"], varies={}, seeds=[0, 1, 2])
    runs = ordered(grid(asked))
    one, two = (Queue(runs, Store(Path(where.results)), where) for _ in range(2))
    names = []
    for queue in (two, one, one, two, two, two, one, one):
        run, lease = queue.next(float("inf"))
        names.append((run.mixer.name, run.seed))
        finish(run, queue)
        lease.release()
    assert names[:4] == [("identity", 0), ("dft", 0), ("monarch", 0), ("dense", 0)]
    assert names[4:] == [("identity", 1), ("dense", 1), ("dft", 1), ("monarch", 1)]


def test_a_run_in_other_hands_is_waited_for(queue, stop, monkeypatch):
    """A worker stays while another one trains a parent, and takes the child when that is done."""
    base = queue.runs[0]
    del queue.runs[2:]
    lease = queue.store.take(base.id)
    naps = []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 2:  # the other worker finishes
            worker.execute(base, queue.where, stop)
            lease.release()

    # Of the worker alone: subprocess sleeps while it waits for `git`.
    monkeypatch.setattr(worker, "time", SimpleNamespace(time=time.time, perf_counter=time.perf_counter, sleep=nap))
    labels = started(monkeypatch)
    work(queue, stop)
    assert labels == ["base", "child"] and len(naps) == 2


def test_what_meets_a_worker_that_was_taken_for_dead_is_no_failure_of_its_run(queue, stop, monkeypatch, capsys):
    """Who took its lease has cleared away what it was writing, and noted already that it was lost."""
    del queue.runs[1:]

    def robbed(run):
        if queue.store.owner(run.id) and len(labels) == 1:
            queue.store.take(run.id, queue.store.owner(run.id)).release()
            raise FileNotFoundError(".checkpoint.pt.0123abcd")

    labels = started(monkeypatch, robbed)
    assert work(queue, stop) and labels == ["base", "base"]
    assert queue.store.failures(queue.runs[0].id) == [] and queue.store.has(queue.runs[0].id)
    assert "took us for dead" in capsys.readouterr().err


def test_ctrl_c_asks_first_and_insists_the_second_time(stop):
    os.kill(os.getpid(), signal.SIGINT)
    assert stop()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_time_left_follows_finished_runs_progress_and_workers(tmp_path):
    results = Store(tmp_path)
    runs = [make_run("quick_copying", "identity", {}, seed, 0) for seed in range(5)]
    assert launch.time_left(runs, results, 1) == ""
    results.finish(a_record(0, "diverged", wall=1.0), {})
    assert launch.time_left(runs, results, 1) == ""
    results.finish(a_record(1, wall=100.0), {})
    assert launch.time_left(runs, results, 1) == "about 5:00 left"
    assert launch.time_left(runs, results, 2) == "about 2:30 left"
    assert launch.time_left(runs, results, 8) == "about 1:40 left"
    (results.open(runs[2].id) / "progress.json").write_text('{"step": 1, "steps": 4}')
    assert launch.time_left(runs, results, 1) == "about 4:35 left"
    results.finish(a_record(2, wall=7100.0), {})
    assert launch.time_left(runs, results, 1) == "about 2:00:00 left"

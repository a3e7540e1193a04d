"""What one run computes and says of it, against closed forms: optimiser step, evaluation, streams, the record."""

import dataclasses
import hashlib
import math
import mmap
import subprocess
import time

import numpy as np
import pytest
import torch

from bench import backbone, evaluate, provenance, registry, train
from bench import run as one_run
from bench.compose import ROOT, make_run
from bench.mixers import quasiseparable
from bench.mixers.low_rank import LowRank
from bench.run import execute
from bench.seeds import Streams
from bench.store import Store
from bench.tasks.base import Places
from tests.conftest import built, setting

SMALL = {"protocol.budget.steps": 3, "protocol.budget.batch": 16, "protocol.task.held_out": 40, "mixer.heads": 2}


def a_run(seed: int = 0, **changes):
    return make_run("quick_recall", "low_rank", SMALL | changes, seed, 0)


def training_of(run, folder, streams: Streams, micro_batches: int) -> train.Training:
    """On a task whose batch is the same at every step."""
    model, task = built(run)
    return train.Training(model, task, run.protocol, streams, setting(folder, micro_batches))


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_optimiser_steps_are_adamw_written_out(tmp_path, clip, micro_batches):
    """Mean loss, clip, AdamW with the rate of its step, decay of matrices only. A large eps makes scales count."""
    values = {"lr": 0.1, "betas": [0.7, 0.8], "eps": 0.01, "weight_decay": 0.3, "clip": clip}
    run = a_run(**{f"protocol.optimiser.{key}": value for key, value in values.items()})
    model, task = built(run)
    batch = task.batch(None, 0, 16, slice(0, 16))
    weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
    names, first = [name for name, _ in model.named_parameters()], [torch.zeros_like(w) for w in weights]
    second = [torch.zeros_like(w) for w in weights]
    for step in range(3):
        outputs = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (batch,))
        grads = torch.autograd.grad(task.loss(outputs, batch) / task.count(batch), weights)
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        grads = [g * min(1, clip / norm) if clip else g for g in grads]
        rate = train.learning_rate(step, 3, 0.1, run.protocol.schedule)
        for i, (w, g) in enumerate(zip(weights, grads, strict=True)):
            first[i], second[i] = 0.7 * first[i] + 0.3 * g, 0.8 * second[i] + 0.2 * g * g
            ratio = first[i] / (1 - 0.7 ** (step + 1)) / ((second[i] / (1 - 0.8 ** (step + 1))).sqrt() + 0.01)
            weights[i] = (w * (1 - rate * 0.3 * (w.ndim >= 2)) - rate * ratio).detach().requires_grad_()
    training = training_of(run, tmp_path, Streams(0, 0), micro_batches)
    train.fit(training)
    for name, w, p in zip(names, weights, training.model.parameters(), strict=True):
        torch.testing.assert_close(p, w, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("rates", [{"dropout": 0.5}, {"drop_path": 0.9, "layers": 2}])
def test_dropout_is_new_at_every_step_and_for_every_stream(tmp_path, rates):
    """With a learning rate of zero and one batch, only dropout can move the training loss."""

    def losses(streams, **changes):
        training = training_of(a_run(**{"protocol.optimiser.lr": 0.0} | changes), tmp_path, streams, 1)
        train.fit(training)
        return [loss for _, loss in training.trace.curve]

    on = {f"protocol.backbone.{key}": value for key, value in rates.items()}
    plain, one, other = losses(Streams(0, 0)), losses(Streams(0, 0), **on), losses(Streams(0, 1), **on)
    assert len(set(plain)) == 1 and len(set(one)) == 3 and not set(one) & set(other)
    assert losses(Streams(0, 0), **on) == one


def scores(model, task) -> dict[str, float]:
    """Metrics of the model as it stands, all held-out examples at once."""
    with torch.no_grad():
        (batch,) = task.held_out_batches("held_out", 40)
        return task.metrics("held_out", task.outcomes(model.eval()(batch), batch))


def test_metrics_are_those_of_the_saved_and_of_the_averaged_weights_without_dropout(where, tmp_path):
    """And the last, short batch of a held-out set counts no example twice: 40 examples in batches of 16."""
    run = a_run(**{"protocol.optimiser.ema": 0.5, "protocol.backbone.dropout": 0.5})
    record = execute(run, where, lambda: False)
    ready, store = one_run.build(run, where, "cpu"), Store(one_run.results(where))
    training = train.Training(ready.model, ready.task, run.protocol, ready.streams, setting(tmp_path))
    train.fit(training)  # the same once more, for its averages
    last = {name: p.detach().clone() for name, p in ready.model.named_parameters()}
    saved = torch.load(store.weights(run.id), weights_only=True)
    assert all(torch.equal(saved[name], p) for name, p in last.items())
    expected = scores(ready.model, ready.task)
    with torch.no_grad():
        for p, value in zip(ready.model.parameters(), training.average, strict=True):
            p.copy_(value)
    expected |= {f"ema_{name}": value for name, value in scores(ready.model, ready.task).items()}
    assert record.metrics == pytest.approx(expected, rel=1e-5) and expected["ema_loss"] != expected["loss"]


def test_evaluation_obeys_the_precision():
    model, task = built(a_run())
    parts, both = task.held_out(), ("fp32", "bf16")
    (_, exact), (_, rough) = (evaluate.evaluate(model, task, parts, 16, "cpu", precision) for precision in both)
    exact, rough = exact["held_out"]["loss"], rough["held_out"]["loss"]
    assert not np.array_equal(exact, rough) and np.allclose(exact, rough, rtol=0.05)
    assert len(exact) == 40


def test_one_loss_that_is_not_finite_is_enough(tmp_path):
    """Also between two points of the curve, and if the weights survive it."""
    training = training_of(a_run(**{"protocol.budget.steps": 200}), tmp_path, Streams(0, 0), 1)
    loss = training.task.loss
    training.task.loss = lambda outputs, batch: loss(outputs, batch) + (math.inf if training.done == 5 else 0)
    with pytest.raises(train.Diverged, match="by step 8"):
        train.fit(training)


def test_metrics_that_are_not_finite_are_a_divergence(where):
    """Here the only step's loss is finite and the weights after it are huge."""
    record = execute(a_run(**{"protocol.optimiser.lr": 1e20, "protocol.budget.steps": 1}), where, lambda: False)
    assert (record.outcome, record.metrics) == ("diverged", {}) and "metrics are not finite" in record.reason


def test_a_child_keeps_its_parents_calibration(where):
    parent = a_run(**{"protocol.shell.gain": 0.5})
    record = execute(parent, where, lambda: False)
    assert all(gain > 0 for gain in record.gain)
    plain = a_run(**{"protocol.shell.gain": 0.5, "protocol.budget.steps": 1})
    protocol = dataclasses.replace(plain.protocol, init=parent.protocol_id)
    child = dataclasses.replace(plain, protocol=protocol, parent=parent, replica=1)
    assert execute(child, where, lambda: False).gain == ()
    store = Store(one_run.results(where))
    before, after = (torch.load(store.weights(r.id), weights_only=True) for r in (parent, child))
    scales = [name for name in before if name.endswith(".scale")]
    assert scales and all(torch.equal(before[name], after[name]) and before[name] != 1 for name in scales)


def test_weights_that_are_gone_are_trained_again_and_the_record_stays(where):
    run, store = a_run(), Store(one_run.results(where))
    execute(run, where, lambda: False)
    weights, path = torch.load(store.weights(run.id), weights_only=True), store.folder(run.id) / "record.json"
    text = path.read_bytes()
    store.weights(run.id).unlink()
    execute(run, where, lambda: False)
    again = torch.load(store.weights(run.id), weights_only=True)
    assert path.read_bytes() == text and all(torch.equal(again[name], value) for name, value in weights.items())


def test_an_unfit_mixer_is_recorded_with_its_reason_and_not_trained(where, monkeypatch):
    monkeypatch.setattr(LowRank, "unfit", classmethod(lambda cls, grant, args: "too low"))
    record = execute(a_run(), where, lambda: False)
    assert (record.outcome, record.reason, record.cost.tokens, record.metrics) == ("unfit", "too low", 0, {})
    assert not Store(one_run.results(where)).weights(record.id).exists()


def test_the_records_figures_are_what_they_say(where):
    run = a_run(**{"protocol.backbone.layers": 2})
    record = execute(run, where, lambda: False)
    model, task = built(run)
    assert record.cost.tokens == 3 * 16 * task.spec().length
    rank, width = run.mixer.args["rank"], run.protocol.backbone.width
    assert record.capacity.parameters == sum(p.numel() for p in model.parameters())
    taps = run.protocol.shell.conv_width + 1
    assert record.capacity.mixer_parameters == 2 * (2 * 2 * rank) * (width + taps)  # layers, (q, k) x heads x rank
    assert record.capacity.flops == 2 * model.layers[0].shell.mixer.flops(task.spec().length)
    assert record.hashes.shared_init == backbone.shared_digest(one_run.build(run, where, "cpu").model)


def test_wall_time_counts_what_was_spent_before_a_stop(where):
    def slow() -> bool:
        time.sleep(0.5)
        return True

    assert execute(a_run(), where, slow) is None
    assert execute(a_run(), where, lambda: False).cost.wall > 0.5


def test_code_digests_are_of_the_files_that_make_a_runs_numbers():
    found = one_run.code_digests(a_run())
    needed = {
        "run",
        "train",
        "backbone",
        "shells/base",
        "shells/gated",
        "seeds",
        "registry",
        "config",
        "mixers/base",
        "tasks/base",
    }
    needed |= {"kernels", "kernels/conv", "kernels/low_rank"}
    assert needed | {"mixers/low_rank", "tasks/recall", "tasks/generated"} <= set(found)
    others = {"mixers/dense", "shells/plain", "kernels/cosine_sums", "tasks/glue", "store", "record", "cli"}
    assert not others & set(found)
    for name, value in found.items():
        path = ROOT / "bench" / ("kernels/__init__.py" if name == "kernels" else f"{name}.py")
        assert value == hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def test_the_batches_digest_sees_seed_content_order_and_size(tmp_path):
    task = registry.make_task(a_run(), Places(None, tmp_path))
    plain = one_run.batches_digest(task, Streams(0, 0), 16, 3)
    assert plain == one_run.batches_digest(task, Streams(0, 0), 16, 3)
    others = [(Streams(1, 0), 16, 3), (Streams(0, 1), 16, 3), (Streams(0, 0), 8, 3), (Streams(0, 0), 16, 4)]
    assert plain not in [one_run.batches_digest(task, *other) for other in others]
    batch = task.batch
    task.batch = lambda *a: batch(*a) | {"labels": batch(*a)["labels"] + 1}
    assert one_run.batches_digest(task, Streams(0, 0), 16, 3) != plain


def test_streams_are_keyed_by_seed_replica_purpose_and_index():
    keys = [(0, 0, "a", 0), (1, 0, "a", 0), (0, 1, "a", 0), (0, 0, "b", 0), (0, 0, "a", 1)]
    assert len({Streams(s, r).draw(purpose, i).random() for s, r, purpose, i in keys}) == len(keys)
    assert Streams(0, 0).draw("a", 7).random() == Streams(0, 0).draw("a", 7).random()


def test_every_epoch_is_another_permutation_of_all_items_however_it_is_cut():
    whole = Streams(0, 0).order(0, 30, 10)
    epochs = whole.reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    parts = [Streams(0, 0).order(start, 7, 10)[: 30 - start] for start in range(0, 30, 7)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert not np.array_equal(Streams(1, 0).order(0, 30, 10), whole)


def test_a_loss_that_was_not_finite_before_a_stop_is_not_forgotten(where, monkeypatch):
    """An infinite loss with finite gradients trains on; whether the run was stopped behind it must not matter."""
    step, run = train.Training.optimiser_step, a_run(**{"protocol.budget.steps": 130})

    def once_infinite(self):
        if self.done == 2:
            self.totals[0] = float("inf")
        step(self)

    monkeypatch.setattr(train.Training, "optimiser_step", once_infinite)
    calls = iter(range(1000))
    record = execute(run, where, lambda: next(calls) == 2)
    assert record is not None and record.outcome == "diverged"


def test_a_checkpoint_of_other_code_or_micro_batches_is_dropped(where, capsys):
    run, store = a_run(), Store(one_run.results(where))
    calls = iter(range(10))
    assert execute(run, where, lambda: next(calls) == 1) is None
    checkpoint = store.folder(run.id) / "checkpoint.pt"
    done = torch.load(checkpoint, weights_only=True)["done"]
    other = dataclasses.replace(where, micro_batches=2)
    record = execute(run, other, lambda: False)
    assert done == 2 and record.environment.micro_batches == 2
    assert "other code or with other micro-batches" in capsys.readouterr().err
    assert not checkpoint.exists()


def test_code_that_changed_under_a_running_process_is_refused(monkeypatch):
    path = str(ROOT / "bench" / "shells" / "gated.py")
    monkeypatch.setitem(provenance.LOADED, path, "another")
    with pytest.raises(one_run.Refusal, match=r"gated.py has changed since this process loaded it"):
        provenance.code_digests(a_run())


def test_a_record_says_whether_its_commit_is_all_of_the_code(tmp_path, monkeypatch):
    def git(*words):
        named = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        return subprocess.run(
            ["git", "-C", tmp_path, *named, *words], check=True, capture_output=True, text=True
        ).stdout

    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    say = provenance.commit.__wrapped__
    assert say() == ""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "code.py").write_text("1")
    (tmp_path / "results.md").write_text("1")
    git("init")
    git("add", "-A")
    git("commit", "-m", "x")
    head = git("rev-parse", "HEAD").strip()
    (tmp_path / "results.md").write_text("2")
    assert say() == head
    (tmp_path / "bench" / "code.py").write_text("2")
    assert say() == head + "+changes"


def test_the_peak_of_a_run_is_its_own():
    """The ballast is mapped, not allocated: what malloc had spare it would take, and keep when it is freed."""
    provenance.reset_peak_memory("cpu")
    before = provenance.peak_memory("cpu")
    with mmap.mmap(-1, 150_000_000) as ballast:
        ballast.write(bytes(1) * 150_000_000)
        high = provenance.peak_memory("cpu")
        provenance.reset_peak_memory("cpu")
    assert high > before + 100_000_000
    provenance.reset_peak_memory("cpu")
    assert provenance.peak_memory("cpu") < high - 100_000_000


def test_gain_is_measured_with_the_plain_backend_and_training_has_the_asked_one(where, monkeypatch):
    """Scales must not depend on where a run is trained, and a kernel cannot run on the host."""
    run = make_run("quick_recall", "quasiseparable", SMALL, 0, 0)
    seen = []
    calibrate = backbone.calibrate

    def noted(model, batch, target):
        seen.extend(layer.shell.mixer.backend for layer in model.layers)
        return calibrate(model, batch, target)

    def stop(training):
        seen.extend(layer.shell.mixer.backend for layer in training.model.layers)
        raise train.Interrupted

    monkeypatch.setattr(backbone, "calibrate", noted)
    monkeypatch.setattr(train, "fit", stop)
    monkeypatch.setattr(registry, "backend", lambda cls, asked, device: "mamba_ssm")
    monkeypatch.setattr(quasiseparable, "mamba_scan", lambda: None)
    assert execute(run, where, lambda: False) is None
    assert seen == ["torch", "mamba_ssm"]


def test_a_batch_that_does_not_divide_over_devices_is_refused_before_they_start(where):
    with pytest.raises(one_run.Refusal, match=r"a batch of 16 cannot be cut into 3 devices x 1 micro-batches"):
        execute(a_run(), dataclasses.replace(where, devices=3), lambda: False)


def test_a_gain_that_is_not_finite_is_a_divergence_and_leaves_a_record(where, monkeypatch):
    monkeypatch.setattr(backbone, "calibrate", lambda *_: [(float("nan"), 0.0)])
    record = execute(a_run(), where, lambda: False)
    assert record.outcome == "diverged" and "gain" in record.reason and record.gain == ()

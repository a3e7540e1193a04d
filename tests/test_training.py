"""Training: exact resume, micro-batches and ranks that do not change the objective, divergence, the schedule."""

import dataclasses
import multiprocessing
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

from bench import Refusal, ranks, train
from bench import run as one_run
from bench.compose import make_run, make_where
from bench.config import MISALIGNED, Run, Schedule
from bench.run import execute
from bench.seeds import Streams
from bench.store import Store
from tests.conftest import built, setting, shrunk

# Everything that a checkpoint has to carry is on: EMA, clip, accumulation, dropout, drop path.
CHANGES = {
    "protocol.budget.steps": 12,
    "protocol.budget.batch": 16,
    "protocol.backbone.layers": 2,
    "protocol.backbone.dropout": 0.1,
    "protocol.backbone.drop_path": 0.5,
    "protocol.optimiser.ema": 0.9,
    "protocol.optimiser.clip": 0.1,
    "mixer.heads": 2,
}


def a_run(**changes) -> Run:
    return make_run("quick_recall", "low_rank", CHANGES | changes, 0, 0)


def outcome(record, store: Store) -> tuple:
    weights = torch.load(store.weights(record.id), weights_only=True)
    return record.metrics, record.curve, {name: value.numpy().tobytes() for name, value in weights.items()}


@pytest.fixture
def accumulating(where):
    return dataclasses.replace(where, micro_batches=4)


def test_a_stopped_and_resumed_run_ends_bitwise_equal(accumulating, tmp_path):
    whole = execute(a_run(), accumulating, lambda: False)
    stopped = dataclasses.replace(accumulating, results=str(tmp_path / "stopped"))
    for after in (1, 4, 2):
        calls = iter(range(100))
        assert execute(a_run(), stopped, lambda calls=calls, after=after: next(calls) + 1 == after) is None
    resumed = execute(a_run(), stopped, lambda: False)
    assert "ema_accuracy" in whole.metrics and len(whole.curve) == 12
    assert outcome(resumed, Store(tmp_path / "stopped")) == outcome(whole, Store(tmp_path / "results"))


@pytest.mark.parametrize(("hook", "call"), [("training_step", 5), ("on_train_batch_end", 8)])
def test_sigterm_is_ours_to_answer_wherever_it_comes(accumulating, tmp_path, monkeypatch, hook, call):
    """In the first pass of a step, and just after a step's end, when nobody will look before the next one's."""
    heard, calls, plain = [], iter(range(1, 100)), getattr(train.Training, hook)

    def struck(self, *given):
        plain(self, *given)
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train.Training, hook, struck)
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
    try:
        assert execute(a_run(), accumulating, lambda: bool(heard)) is None and heard == [True]
    finally:
        signal.signal(signal.SIGTERM, before)
    folder = Store(tmp_path / "results").folder(a_run().id)
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["done"] == (2 if hook == "training_step" else 3)


# `mixerbench run` whose process is killed in optimiser step 21, after the checkpoint of step 20.
KILLED = """
import os, signal, sys
from bench import cli, train
step = train.Training.optimiser_step
def struck(self):
    if self.done == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    step(self)
train.Training.optimiser_step = struck
sys.exit(cli.main())
"""


def test_a_killed_run_ends_bitwise_equal(accumulating, tmp_path):
    words = [
        "protocol=quick_recall",
        "mixer=low_rank",
        *(f"{k}={v}" for k, v in (CHANGES | {"protocol.budget.steps": 60}).items()),
    ]
    places = ["where.device=cpu", "where.micro_batches=4", "where.checkpoint_seconds=0"]
    killed = [sys.executable, "-c", KILLED, "run", *words, *places, f"where.results={tmp_path / 'killed'}"]
    ended = subprocess.run(killed, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL
    run = a_run(**{"protocol.budget.steps": 60})
    store = Store(tmp_path / "killed")
    assert not store.has(run.id)
    assert torch.load(store.folder(run.id) / "checkpoint.pt", weights_only=True)["done"] == 20
    resumed = execute(run, dataclasses.replace(accumulating, results=str(tmp_path / "killed")), lambda: False)
    assert outcome(resumed, store) == outcome(execute(run, accumulating, lambda: False), Store(tmp_path / "results"))


@pytest.mark.parametrize("mixer", ["attention", "quasiseparable"])
def test_micro_batches_do_not_change_loss_or_gradients(tmp_path, mixer):
    results = []
    for micro_batches in (1, 4):
        run = make_run(
            "quick_recall", mixer, {"protocol.budget.steps": 1, "protocol.optimiser.lr": 1.0, "mixer.heads": 2}, 0, 0
        )
        results.append(first_step(run, tmp_path, micro_batches))
    (loss, grads), (other_loss, other_grads) = results
    assert loss == pytest.approx(other_loss, rel=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(other_grads[name], grad, rtol=1e-4, atol=1e-7, msg=name)


def first_step(run: Run, tmp_path, micro_batches: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and clipped gradients of the first optimiser step, caught as the optimiser takes it."""
    model, task = built(run)
    training = train.Training(model, task, run.protocol, Streams(0, 0), setting(tmp_path, micro_batches))
    grads = {}
    configure = training.configure_optimizers

    def configured():
        optimiser = configure()
        names = {p: n for n, p in model.named_parameters()}
        optimiser.register_step_pre_hook(
            lambda *_: grads.update({names[p]: p.grad.clone() for p in names if p.grad is not None})
        )
        return optimiser

    training.configure_optimizers = configured
    train.fit(training)
    return training.trace.curve[0][1], grads


TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, TWO_GPUS])])
def test_two_ranks_give_the_weights_of_one_process_with_accumulation(device, where, tmp_path):
    """By gloo on CPUs, by NCCL on two GPUs; batches come from a process beside each rank."""
    changes = {"protocol.budget.steps": 3, "protocol.budget.batch": 16, "mixer.heads": 2}
    run = make_run("quick_recall", "low_rank", changes, 0, 0)
    one = execute(run, dataclasses.replace(where, device=device, micro_batches=2, compile="off"), lambda: False)
    words = [f"{k}={v}" for k, v in changes.items()]
    command = [sys.executable, "-m", "bench.cli", "run", "protocol=quick_recall", "mixer=low_rank", *words]
    command += [f"where.device={device}", "where.devices=2", "where.compile=off", "where.loaders=1"]
    command += [f"where.results={tmp_path / 'two'}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    two = Store(tmp_path / "two").record(run.id)
    assert two.environment.world == 2
    assert [loss for _, loss in two.curve] == pytest.approx([loss for _, loss in one.curve], rel=1e-5)
    ours = torch.load(Store(tmp_path / "results").weights(run.id), weights_only=True)
    theirs = torch.load(Store(tmp_path / "two").weights(run.id), weights_only=True)
    for name, value in ours.items():
        # Adam divides by |gradient|: where that is near zero, rounding shows; 1e-3 of the three steps' length at most.
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=3e-5, msg=name)


def test_what_the_user_can_mend_is_said_by_the_rank_that_meets_it(where, tmp_path):
    run, there = make_run("mini_mlm", "identity", {"mixer.heads": 4}, 0, 0), dataclasses.replace(where, devices=2)
    with pytest.raises(Refusal, match=r"data set simplewiki: .* is missing"):
        ranks.execute_ranks(run, dataclasses.replace(there, data=str(tmp_path)), lambda: False)


@pytest.mark.parametrize(
    ("error", "kind"),
    [(torch.OutOfMemoryError("CUDA out of memory"), MemoryError), (ValueError("odd"), RuntimeError)],
)
def test_a_rank_tells_what_went_wrong_in_it(error, kind, where, monkeypatch):
    def execute(*_):
        raise error

    monkeypatch.setattr(ranks, "execute", execute)
    monkeypatch.setattr(ranks, "_end_with", lambda parent: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    faults = multiprocessing.get_context("spawn").SimpleQueue()
    with pytest.raises(type(error)):
        ranks._rank(a_run(), where, 0, 0, "127.0.0.1", 1, os.getpid(), faults)
    told = faults.get()
    assert (type(told), str(told)) == (kind, f"{type(error).__name__}: {error}")


def test_the_port_of_the_ranks_is_kept_for_them_until_they_listen():
    with ranks.reserved("127.0.0.1") as kept:
        place = kept.getsockname()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(place)
        with (
            socket.create_server(("", place[1])) as rank,
            socket.create_connection(place) as asks,
            rank.accept()[0] as heard,
        ):
            assert heard.getpeername() == asks.getsockname()


def test_a_loss_that_is_not_finite_ends_as_a_diverged_record(where):
    record = execute(a_run(**{"protocol.optimiser.lr": 1e30, "protocol.optimiser.clip": 0.0}), where, lambda: False)
    assert (record.outcome, record.metrics) == ("diverged", {})
    assert "not finite by step" in record.reason
    assert all(loss == loss for _, loss in record.curve)


def test_the_child_of_a_diverged_parent_is_diverged_too(where, monkeypatch):
    parent = a_run(**{"protocol.optimiser.lr": 1e30, "protocol.optimiser.clip": 0.0})
    child = dataclasses.replace(
        a_run(), protocol=dataclasses.replace(a_run().protocol, init=parent.protocol_id), parent=parent
    )
    execute(parent, where, lambda: False)
    record = execute(child, where, lambda: False)
    assert record.outcome == "diverged" and parent.id in record.reason


def child_of(parent: Run, **changes) -> Run:
    plain = a_run(**changes)
    return dataclasses.replace(
        plain, protocol=dataclasses.replace(plain.protocol, init=parent.protocol_id), parent=parent
    )


def test_a_child_starts_from_its_parents_weights_and_a_head_of_its_own(where):
    parent = a_run(**{"protocol.budget.steps": 2})
    execute(parent, where, lambda: False)
    child = child_of(
        parent, **{"protocol.optimiser.lr": 0.0, "protocol.budget.steps": 1, "protocol.optimiser.weight_decay": 0.0}
    )
    execute(child, where, lambda: False)
    store = Store(one_run.results(where))
    before, after = (torch.load(store.weights(r.id), weights_only=True) for r in (parent, child))
    equal = {name: torch.equal(before[name], after[name]) for name in before}
    assert all(same for name, same in equal.items() if not name.startswith("head."))
    assert not equal["head.weight"]


def test_a_child_of_another_shape_is_refused(where):
    parent = a_run(**{"protocol.budget.steps": 1})
    execute(parent, where, lambda: False)
    with pytest.raises(one_run.Refusal, match=r"cannot start from .*: shapes differ for embedding"):
        execute(child_of(parent, **{"protocol.backbone.width": 16}), where, lambda: False)


def test_replicas_draw_their_own_head_and_batches(where):
    parent = a_run(**{"protocol.budget.steps": 1})
    execute(parent, where, lambda: False)
    first, second = (dataclasses.replace(child_of(parent), replica=r) for r in (0, 1))
    one, two = execute(first, where, lambda: False), execute(second, where, lambda: False)
    assert one.id != two.id and one.hashes.batches != two.hashes.batches and one.metrics != two.metrics


def test_precision_is_obeyed(where):
    seen = {}
    for precision in ("fp32", "bf16"):
        record = execute(a_run(**{"protocol.precision": precision, "protocol.budget.steps": 2}), where, lambda: False)
        seen[precision] = record.curve
        assert record.environment.precision == precision
    assert seen["fp32"] != seen["bf16"]
    assert seen["fp32"][0][1] == pytest.approx(seen["bf16"][0][1], rel=0.02)


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder),))


@pytest.mark.parametrize("kind", ["evil", "cut", "half", "empty"])
def test_an_unreadable_checkpoint_is_dropped_and_never_executed(where, tmp_path, kind):
    run = a_run()
    path = Store(one_run.results(where)).open(run.id) / "checkpoint.pt"
    several = {str(n): torch.zeros(64, 64) for n in range(8)}  # half of them torch takes for another kind of file
    torch.save({"done": Evil(tmp_path / "executed")} if kind == "evil" else several, path)
    half = path.stat().st_size // 2
    path.write_bytes(path.read_bytes()[: {"evil": None, "cut": 2000, "half": half, "empty": 0}[kind]])
    assert execute(run, where, lambda: False).outcome == "ok"
    assert not (tmp_path / "executed").exists() and not path.exists()


def test_schedule_closed_form():
    linear, cosine = Schedule("linear", 0.1, 0.02), Schedule("cosine", 0.1, 0.0)
    rates = [train.learning_rate(step, 100, 2.0, linear) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == 2.0 and rates[99] == pytest.approx(0.04)
    assert rates[55] == pytest.approx(2.0 * (0.02 + 0.98 * (1 - 45 / 89)))
    assert train.learning_rate(99, 100, 1.0, cosine) == pytest.approx(0)
    assert train.learning_rate(54, 99, 1.0, Schedule("cosine", 10 / 99, 0.0)) == pytest.approx(0.5)


def test_ema_is_the_recursion(tmp_path):
    run = a_run(**{"protocol.budget.steps": 3})
    model, task = built(run)
    training = train.Training(model, task, run.protocol, Streams(0, 0), setting(tmp_path))
    expected = [p.detach().clone() for p in model.parameters()]
    step = training.optimiser_step

    def stepped():
        step()
        for average, parameter in zip(expected, model.parameters(), strict=True):
            average.mul_(0.9).add_(parameter.detach(), alpha=0.1)

    training.optimiser_step = stepped
    train.fit(training)
    for average, value in zip(training.average, expected, strict=True):
        torch.testing.assert_close(average, value)


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("protocol", ["mini_mlm", "quick_recall", "mini_cola", "table2_mini_stsb", "mini_images"])
def test_head_and_loss_compile_without_a_graph_break(protocol, tmp_path):
    """Else outputs over a whole vocabulary are written in fp32, and read again, between operators."""
    run = shrunk(make_run(protocol, "identity", {"mixer.heads": 2}, 0, 0))
    model, task = built(run)
    training = train.Training(model.eval(), task, run.protocol, Streams(0, 0), setting(tmp_path))
    batch = task.batch(training.streams, 0, 4, slice(0, 4))
    torch._dynamo.reset()
    compiled = torch.compile(training.loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(model.read(batch), batch), task.loss(model(batch), batch))


@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize(("mixer", "level"), [("identity", False), ("low_rank", MISALIGNED)])
def test_what_is_compiled_for_a_run_serves_the_next_of_its_arm(mixer, level, tmp_path):
    """With another seed, so other weights and another order; bit for bit as when it comes first."""
    run = shrunk(make_run("quick_recall", mixer, {"mixer.sam": level, "mixer.heads": 2}, 0, 0))
    counted = torch._dynamo.utils.counters["stats"]

    def trained(seed):
        model, task = built(dataclasses.replace(run, seed=seed))
        how = dataclasses.replace(setting(tmp_path), compiled=True)
        train.fit(train.Training(model, task, run.protocol, Streams(seed, 0), how))
        return list(model.parameters()), counted["unique_graphs"]

    torch._dynamo.reset()
    alone, _ = trained(1)
    torch._dynamo.reset()
    (other, before), (second, after) = trained(0), trained(1)
    assert before == after and all(map(torch.equal, alone, second)) and not all(map(torch.equal, other, second))


def test_decay_follows_the_number_of_dimensions_alone():
    model, _ = built(a_run())
    matrices, others = train.optimiser_groups(model, a_run().protocol.optimiser)
    assert matrices["weight_decay"] == 0.01 and others["weight_decay"] == 0.0
    assert all(p.ndim >= 2 for p in matrices["params"]) and all(p.ndim < 2 for p in others["params"])
    assert len(matrices["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_calibration_sets_every_layer_to_the_target(where):
    run = a_run(**{"protocol.shell.gain": 0.5})
    ready = one_run.build(run, where, "cpu")
    before = one_run.calibrated(ready, run)
    group = ready.task.spec().group
    batch = ready.task.batch(ready.streams, 0, run.protocol.budget.batch, slice(0, 16 * group))
    scales = [layer.shell.scale.item() for layer in ready.model.layers]
    again = train_free_gains(ready.model, batch)
    assert [gain * scale for (gain, _), scale in zip(before, scales, strict=True)] == pytest.approx([0.5, 0.5])
    assert [gain * scale for (gain, _), scale in zip(again, scales, strict=True)] == pytest.approx([0.5, 0.5], rel=1e-4)
    assert all(0 <= varying <= total for total, varying in before)


def train_free_gains(model, batch):
    from bench import backbone

    return backbone.calibrate(model, batch, 0.0)


def test_a_batch_that_cannot_be_cut_is_refused(where):
    with pytest.raises(one_run.Refusal, match="cannot be cut into 1 devices x 3 micro-batches"):
        execute(a_run(), dataclasses.replace(where, micro_batches=3), lambda: False)


def test_where_is_refused_for_a_device_that_is_not_there(where):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(one_run.Refusal, match="no CUDA device is visible"):
        execute(a_run(), make_where({"where.device": "cuda"}), lambda: False)

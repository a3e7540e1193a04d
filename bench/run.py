"""One run, from Run to record. Reads top to bottom; what is long stands in the room that it belongs to."""

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bench import Refusal, backbone, evaluate, registry, train, tune
from bench.capacity import capacity_of, model_of
from bench.config import Run, Where, part_size, resolved
from bench.full import save
from bench.provenance import card, code_digests, environment, peak_memory, reset_peak_memory, stamp
from bench.record import SCHEMA, Capacity, Chosen, Cost, Hashes, Record
from bench.seeds import Streams
from bench.store import Store, utc
from bench.tasks.base import SELECTION, Task
from bench.weights import read_weights
from bench.where import device_of, places, results
from bench.whole import replace_whole

CALIBRATION_EXAMPLES = 32


@dataclass
class Built:
    """A run made ready: task with data, model with values (None if it is never trained), and what the record says."""

    task: Task | None
    model: backbone.Backbone | None
    streams: Streams | None
    hashes: Hashes
    capacity: Capacity
    gain: list[tuple[float, float]]
    backend: str


@dataclass(frozen=True)
class Ended:
    """How a run ended, for its record."""

    outcome: str
    reason: str
    metrics: dict[str, float]
    curve: tuple
    cost: Cost
    compiled: bool
    chosen: Chosen | None


def execute(run: Run, where: Where, should_stop: Callable[[], bool]) -> Record | None:
    """Train and evaluate a run and leave its record; None if it was asked to stop (it goes on from its checkpoint).

    A run that has a record but whose weights are gone is retrained for its weights; its record stays.
    """
    store = Store(results(where))
    point = tune.settle(run, store)
    acting = tune.acting(run, point)  # what is trained under the run's id: the values of its point in their places
    unfit = registry.check(acting)
    device = device_of(run, where)
    registry.backend(registry.mixer_class(run.mixer.name), where.backend, device)
    folder = store.open(run.id)
    if unfit or point.outcome:
        known = (point.outcome, point.reason) if point.outcome else ("unfit", unfit)
        return finish_without_training(run, where, device, store, *known, point.chosen)
    if run.parent is not None:
        above = store.record(run.parent.id)
        if above is None:
            raise RuntimeError(f"parent {run.parent.id} of {run.id} has no record")
        if above.outcome != "ok":
            reason = f"parent {run.parent.id} ({run.parent.label}): {above.outcome}: {above.reason}"
            return finish_without_training(run, where, device, store, above.outcome, reason, point.chosen)
    group = registry.make_task(run, places(where)).spec().group
    part_size(run.label, acting.protocol.budget.batch, where.devices * where.nodes, where.micro_batches, group)
    setting = train.Setting(
        device=device,
        rank=int(os.environ.get("RANK", 0)),
        world=where.devices * where.nodes,
        micro_batches=where.micro_batches,
        loaders=where.loaders,
        compiled=where.compiled(device),
        graph=where.one_graph(device),
        folder=folder,
        stamp=stamp(code_digests(run), where.micro_batches),
        write=lambda name, how: replace_whole(folder / name, how),
        checkpoint_seconds=where.checkpoint_seconds,
        should_stop=should_stop,
    )
    return train_and_evaluate(run, acting, point.chosen, where, store, setting)


def train_and_evaluate(
    run: Run, acting: Run, chosen: Chosen | None, where: Where, store: Store, setting: train.Setting
) -> Record | None:
    started = time.perf_counter()
    torch.set_num_threads(where.threads)
    reset_peak_memory(setting.device)
    built = build(acting, where, setting.device)
    if run.parent is not None:
        load_parent(built.model, parent_weights(run, store), run)
    training = train.Training(built.model, built.task, acting.protocol, built.streams, setting)
    outcome, reason, metrics, items, evaluation, startup = "ok", "", {}, {}, 0.0, 0.0
    try:
        if run.parent is None:
            built = replace(built, gain=calibrated(built, acting))
        training.restore()
        startup = time.perf_counter() - started
        train.fit(training)
        begun = time.perf_counter()
        if setting.rank == 0:
            metrics, items = evaluated(training, acting, setting)
        evaluation = time.perf_counter() - begun
        lost = [name for name, value in metrics.items() if not np.isfinite(value)]
        if lost:
            raise train.Diverged(f"metrics are not finite: {', '.join(lost)}")
    except train.Diverged as error:
        outcome, reason, metrics, items = "diverged", str(error), {}, {}
    except train.Interrupted:
        return None
    if setting.rank:
        return None
    spent = cost(acting, training, startup, evaluation, setting.device, started)
    ended = Ended(outcome, reason, metrics, tuple(training.trace.curve), spent, setting.compiled, chosen)
    record = record_of(run, where, setting.device, built, ended)
    if outcome == "ok" and not run.is_trial:  # nothing starts from a trial
        replace_whole(store.weights(run.id), lambda path: save(torch.save, built.model.state_dict(), path))
    store.finish(record, items)
    return store.record(run.id)


def build(run: Run, where: Where, device: str) -> Built:
    """Task and model, every parameter drawn on the host from the stream of its name."""
    task = registry.make_task(run, places(where))
    task.prepare()
    if run.protocol.tune:
        task.require_disjoint()
    backend = registry.backend(registry.mixer_class(run.mixer.name), where.backend, device)
    model = model_of(run, task, backend)
    streams = Streams(run.seed, run.replica)
    backbone.initialise(model, streams, registry.salt(run))
    hashes = Hashes(
        shared_init=backbone.shared_digest(model),
        batches=batches_digest(task, streams, run.protocol.budget.batch, run.protocol.budget.steps),
        optimiser_groups=train.groups_digest(model, run.protocol.optimiser),
    )
    return Built(task, model, streams, hashes, capacity_of(model), [], backend)


def calibrated(built: Built, run: Run) -> list[tuple[float, float]]:
    """Each layer's gain on the first examples of the shared stream; sets the layers' scales if the protocol asks.

    Measured on the host with the plain backend, so that the scales are the same wherever the run is trained.
    """
    group = built.task.spec().group
    size = min(run.protocol.budget.batch, max(group, CALIBRATION_EXAMPLES // group * group))
    batch = built.task.batch(built.streams, 0, run.protocol.budget.batch, slice(0, size))
    with backbone.plain(built.model):
        gains = backbone.calibrate(built.model, batch, run.protocol.shell.gain)
    if not np.isfinite(gains).all():
        raise train.Diverged("the mixers' gain at initialisation is not finite")
    return gains


def parent_weights(run: Run, store: Store) -> dict[str, Tensor]:
    """Those that a run starts from. Ones that are gone are no Refusal: tried again, the parent is trained for them."""
    path, parent = store.weights(run.parent.id), f"run {run.parent.id} ({run.parent.label})"
    if not path.exists():
        raise RuntimeError(f"weights of parent {parent} are gone: {path}")
    again = f"restore it, or delete it and give the command again, which then trains {parent} again for its weights"
    return read_weights(path, again)


def load_parent(model: backbone.Backbone, parent: dict[str, Tensor], run: Run) -> None:
    """Take every weight of the parent that the child has, all but the head; the child's trunk must be there in full."""
    own = model.state_dict()
    taken = {k: v for k, v in parent.items() if k in own and not k.startswith("head.")}
    wrong = [k for k, v in taken.items() if v.shape != own[k].shape]
    wrong += [k for k in own if k.startswith(("embedding.", "layers.")) and k not in taken]
    if wrong:
        raise Refusal(
            f"'{run.label}' cannot start from '{run.parent.label}': shapes differ for {', '.join(sorted(wrong)[:4])}"
        )
    model.load_state_dict({**own, **taken})


def evaluated(training: train.Training, run: Run, setting: train.Setting) -> tuple[dict, dict]:
    """Metrics of the last weights, and beside them ('ema_…') of the averaged ones; items of the last.

    A trial is evaluated on the selection's examples and on nothing that is reported.
    """
    size = run.protocol.budget.batch // (setting.world * setting.micro_batches)
    parts = [SELECTION] if run.is_trial else training.task.held_out()
    arguments = (training.model, training.task, parts, size, setting.device, run.protocol.precision)
    metrics, items = evaluate.evaluate(*arguments)
    if training.average:
        training.average = [a.to(setting.device) for a in training.average]
        with evaluate.averaged(training.model, training.average):
            metrics |= {f"ema_{name}": value for name, value in evaluate.evaluate(*arguments)[0].items()}
    return metrics, items


def batches_digest(task: Task, streams: Streams, size: int, steps: int) -> str:
    """SHA-256 (16 hex digits) of the first batch's content and the items of the first hundred."""
    total = hashlib.sha256()
    for name, value in sorted(task.batch(streams, 0, size, slice(0, size)).items()):
        total.update(f"{name} {tuple(value.shape)} {value.dtype}\n".encode())
        total.update(value.contiguous().numpy().tobytes())
    for step in range(min(steps, 100)):
        total.update(task.order(streams, step, size).astype("<i8").tobytes())
    return total.hexdigest()[:16]


def finish_without_training(
    run: Run, where: Where, device: str, store: Store, outcome: str, reason: str, chosen: Chosen | None
) -> Record:
    """The record of a run whose outcome is known before its first step."""
    nothing = Built(None, None, None, Hashes("", "", ""), Capacity(0, 0, 0, 0), [], "")
    ended = Ended(outcome, reason, {}, (), Cost(*([0.0] * 7), peak_memory=0, tokens=0), False, chosen)
    record = record_of(run, where, device, nothing, ended)
    store.finish(record, {})
    return record


def record_of(run: Run, where: Where, device: str, built: Built, ended: Ended) -> Record:
    return Record(
        schema=SCHEMA,
        id=run.id,
        outcome=ended.outcome,
        reason=ended.reason,
        label=run.label,
        protocol_id=run.protocol_id,
        run=resolved(run),
        digests=code_digests(run),
        hashes=built.hashes,
        capacity=built.capacity,
        gain=tuple(total for total, _ in built.gain),
        gain_varying=tuple(varying for _, varying in built.gain),
        environment=environment(run, where, device, ended.compiled, built.backend),
        cost=ended.cost,
        metrics=ended.metrics,
        curve=ended.curve,
        finished=utc(),
        registration=run.registration,
        chosen=ended.chosen,
        card=card(device),
    )


def cost(run: Run, training: train.Training, startup: float, evaluation: float, device: str, started: float) -> Cost:
    seconds = training.trace.step_seconds or [training.trace.first_step]
    p10, p50, p90 = (float(q) for q in np.quantile(seconds, (0.1, 0.5, 0.9)))
    return Cost(
        wall=training.trace.spent + time.perf_counter() - started,
        startup=startup,
        first_step=training.trace.first_step,
        evaluation=evaluation,
        step_p10=p10,
        step_p50=p50,
        step_p90=p90,
        peak_memory=peak_memory(device),
        tokens=training.done * run.protocol.budget.batch * training.task.spec().length,
    )

"""A training step as one CUDA graph: where it is used, and that it changes no bit."""

import contextlib
import dataclasses

import pytest
import torch

from bench import Refusal, train
from bench.compose import make_run, make_where
from bench.config import MISALIGNED
from bench.replay import Recording, Replay
from bench.seeds import Streams
from tests.conftest import built, setting, shrunk


def graph(device, **changes):
    return make_where({f"where.{key}": value for key, value in changes.items()}).one_graph(device)


def test_a_graph_is_for_one_gpu_that_takes_the_batch_as_a_whole():
    assert graph("cuda", graph="on") and not graph("cpu", graph="on")
    assert graph("cuda") and not graph("cuda", graph="off") and not graph("cpu")
    assert not graph("cuda", compile="off")
    for other in ({"devices": 2}, {"nodes": 2}, {"micro_batches": 2}):
        assert not graph("cuda", **other)
        with pytest.raises(Refusal, match="one device and one micro-batch"):
            graph("cuda", graph="on", **other)


def lengths_alternate(task) -> None:
    """Batches of the whole length and of half of it, as those of GLUE may be."""
    whole = task.batch
    length = task.spec().length

    def batch(streams, step, size, part):
        cut = length // (1 + step % 2)
        return {
            name: value[:, :cut] if value.ndim > 1 else value
            for name, value in whole(streams, step, size, part).items()
        }

    task.batch = batch


def trained(protocol, mixer, folder, as_graph, stop_after=None, device="cuda", level=True):
    """Weights, moments and curve after twelve steps with dropout, stochastic depth, clipping and an average."""
    run = shrunk(make_run(protocol, mixer, {"mixer.heads": 2, "mixer.sam": level}, 0, 0))
    protocol = run.protocol
    protocol = dataclasses.replace(
        protocol,
        backbone=dataclasses.replace(protocol.backbone, layers=2, dropout=0.1, drop_path=0.2),
        optimiser=dataclasses.replace(protocol.optimiser, clip=0.1, ema=0.9),
        budget=dataclasses.replace(protocol.budget, steps=12, batch=8),
    )
    run = dataclasses.replace(run, protocol=protocol)
    asked = iter([False] * (stop_after or 99) + [True])
    how = dataclasses.replace(setting(folder), device=device, graph=as_graph, should_stop=lambda: next(asked))
    while True:
        model, task = built(run, device)
        if task.spec().pooled:
            lengths_alternate(task)
        training = train.Training(model, task, protocol, Streams(0, 0), how)
        training.restore()
        try:
            train.fit(training)
        except train.Interrupted:
            how = dataclasses.replace(how, should_stop=lambda: False)
            continue
        moments = [x for state in training.optimiser.state.values() for x in state.values()]
        return [*model.state_dict().values(), *training.average, *moments], training.trace.curve


RECALL = [("quick_recall", mixer) for mixer in ("low_rank", "quasiseparable", "attention", "toeplitz")]


@pytest.mark.gpu
@pytest.mark.parametrize("level", [True, MISALIGNED])
@pytest.mark.parametrize(("protocol", "mixer"), [*RECALL, ("mini_cola", "low_rank"), ("mini_cola", "toeplitz")])
def test_a_graph_changes_no_bit(protocol, mixer, level, tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    plain, curve = trained(protocol, mixer, tmp_path / "whole", as_graph=False, level=level)
    replayed, replayed_curve = trained(protocol, mixer, tmp_path / "whole", as_graph=True, level=level)
    resumed, resumed_curve = trained(protocol, mixer, tmp_path / "parts", as_graph=True, stop_after=5, level=level)
    assert curve == replayed_curve == resumed_curve
    assert all(map(torch.equal, plain, replayed)) and all(map(torch.equal, plain, resumed))


def test_a_step_that_cannot_be_recorded_says_what_to_set(monkeypatch):
    """The device's part of recording is left out: what is held is what a user reads."""

    def step(inputs):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    replay = object.__new__(Replay)
    replay.step, replay.stream = step, None
    with pytest.raises(RuntimeError, match=r"set where.graph=off \(operation not permitted"):
        replay.record(Recording(), {"x": torch.zeros(1)})

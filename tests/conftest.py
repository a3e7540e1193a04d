"""Shared by the tests: one thread, runs small enough for a test, and the real data's mark."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from bench import backbone, compose, registry, train
from bench.capacity import model_of
from bench.compose import make_where
from bench.config import Run, Where
from bench.seeds import Streams
from bench.tasks.base import Places
from benchmarks.one_step import shrunk as shrunk
from tests.pages import no_browser
from tests.virtual import Virtual

torch.set_num_threads(1)


def pytest_configure(config):
    no_slurm = Virtual.absent()
    if no_slurm and os.environ.get("MIXERBENCH_NEEDS_SLURM"):
        raise pytest.UsageError(f"MIXERBENCH_NEEDS_SLURM is set, but {no_slurm}")
    no_page = no_browser()
    if no_page and os.environ.get("MIXERBENCH_NEEDS_BROWSER"):
        raise pytest.UsageError(f"MIXERBENCH_NEEDS_BROWSER is set, but {no_page}")
    if no_tex() and os.environ.get("MIXERBENCH_NEEDS_TEX"):
        raise pytest.UsageError(f"MIXERBENCH_NEEDS_TEX is set, but {no_tex()}")


def no_tex() -> str:
    """Why tables cannot be compiled here, or ''."""
    return "" if shutil.which("pdflatex") else "there is no pdflatex (Debian: texlive-latex-recommended)"


def pytest_collection_modifyitems(items):
    data, no_slurm, no_page = os.environ.get("MIXERBENCH_DATA", ""), Virtual.absent(), no_browser()
    for item in items:
        if item.get_closest_marker("browser") and no_page:
            item.add_marker(pytest.mark.skip(reason=no_page))
        if item.get_closest_marker("tex") and no_tex():
            item.add_marker(pytest.mark.skip(reason=no_tex()))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("data") and not Path(data or "/nonexistent").is_dir():
            item.add_marker(pytest.mark.skip(reason="MIXERBENCH_DATA does not name a folder with the real data sets"))
        if item.get_closest_marker("slurm") and no_slurm:
            item.add_marker(pytest.mark.skip(reason=no_slurm))


@pytest.fixture(scope="module")
def without_accounting():
    with Virtual(accounting=False, lines="") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def with_accounting():
    """Slurm itself forgets a job soon after its end."""
    with Virtual(accounting=True, lines="MinJobAge=2") as cluster:
        yield cluster


@pytest.fixture
def virtual(request, monkeypatch) -> Virtual:
    """A virtual Slurm cluster of four nodes that the module's tests share; without accounting unless asked for it."""
    accounting = getattr(request, "param", False)
    cluster = request.getfixturevalue("with_accounting" if accounting else "without_accounting")
    monkeypatch.setenv("SLURM_CONF", cluster.conf)
    return cluster


@pytest.fixture
def where(tmp_path) -> Where:
    return make_where({"where.results": str(tmp_path / "results"), "where.device": "cpu"})


def forget() -> None:
    """All that was composed: the yaml files have changed."""
    for cached in (one for one in vars(compose).values() if hasattr(one, "cache_clear")):
        cached.cache_clear()


def built(run: Run, device: str = "cpu", backend: str = "") -> tuple[backbone.Backbone, object]:
    """Model with values and a task whose every batch is its own example: no data set is needed. On 'meta': shapes only,
    and no example, which at full size takes seconds. Backend of the mixers: '' for the plain one."""
    task = registry.make_task(run, Places(None, Path()))
    with torch.device(device):
        model = model_of(run, task, backend or registry.mixer_class(run.mixer.name).backends[0])
    if device != "meta":
        backbone.initialise(model, Streams(run.seed, run.replica), registry.salt(run))
        example = task.example(run.protocol.budget.batch)
        task.batch = lambda streams, step, size, part: {key: value[part] for key, value in example.items()}
    return model, task


def setting(
    folder: Path, micro_batches: int = 1, should_stop=lambda: False, checkpoint_seconds: float = 1e9
) -> train.Setting:
    return train.Setting(
        "cpu",
        0,
        1,
        micro_batches,
        0,
        False,
        False,
        folder,
        "stamp",
        lambda name, how: how(folder / name),
        checkpoint_seconds,
        should_stop,
    )


def rows_are_long(monkeypatch):
    """Toeplitz and the DFT take the rows of a test for those that they cut into blocks, given the backend 'triton'."""
    from bench.mixers import dft, lags

    for room, name, value in ((lags, "TILED", 0), (lags, "TILED_SHARED", 0), (lags, "SHORT", 0), (dft, "PRODUCT", 0)):
        monkeypatch.setattr(room, name, value)
    monkeypatch.setattr(lags, "BLOCK", 4)  # heads of a test are narrow

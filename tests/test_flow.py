"""The flow as a user sees it: a sweep, its table and figure, the quickstart's claims, the chain on real data."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bench.compose import ROOT
from bench.store import Store
from bench.sweep import grid as runs_of
from bench.sweep import load, ordered


def command(*words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "bench.cli", *words], capture_output=True, text=True, env=environment, timeout=600
    )


def cut_down(tmp_path: Path, **changes) -> Path:
    """The quickstart's sweep with some keys replaced."""
    values = yaml.safe_load((ROOT / "sweeps" / "quickstart.yaml").read_text()) | changes
    path = tmp_path / "quickstart.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """One seed of the quickstart's probes, as `make quickstart` runs it."""
    folder = tmp_path_factory.mktemp("flow")
    probes = ["quick_recall", "quick_copying"]
    columns = [{"protocol": name, "metric": "accuracy"} for name in probes]
    sweep = cut_down(folder, protocols=probes, columns=columns, seeds=[0])
    results = f"where.results={folder / 'results'}"
    done = command("sweep", str(sweep), "--workers", "2", results)
    assert done.returncode == 0, done.stdout + done.stderr
    return sweep, folder / "results", results


def accuracy(quickstart, protocol: str) -> dict[tuple, float]:
    sweep, results, _ = quickstart
    store = Store(results)
    found = {}
    for run in runs_of(load(sweep)):
        if run.label == protocol:
            found[run.mixer.name, run.mixer.args["sam"]] = store.record(run.id).metrics["accuracy"]
    return found


def test_recall_is_solved_by_looking_at_the_tokens_and_not_otherwise(quickstart):
    found = accuracy(quickstart, "quick_recall")
    for name in ("attention", "low_rank", "quasiseparable"):
        assert found[name, True] >= 0.9
    for name in ("attention", "low_rank", "toeplitz", "dense"):
        assert found[name, False] < 0.5
    assert found["identity", False] < 0.2  # chance: 1 in 12, 1 in 6 for who knows which values occur


def test_copying_is_solved_by_a_shift_and_not_by_the_identity(quickstart):
    found = accuracy(quickstart, "quick_copying")
    assert found["toeplitz", False] >= 0.9
    assert found["identity", False] < 0.2  # chance: 1 in 8


def test_a_second_sweep_does_nothing_and_the_report_stays_accepted_and_equal(quickstart):
    sweep, results, words = quickstart
    first = command("report", str(sweep), words)
    assert first.returncode == 0, first.stderr
    files = {p.name: p.read_bytes() for p in (results / "quickstart").rglob("*.*")}
    tables = {"table.md", "table.csv", "comparisons.csv", "table.tex", "page.tex", "certificate.json", "summary.md"}
    drawn = {path.stem for path in (results / "quickstart" / "figures").iterdir()}
    assert drawn == {"seeds", "differences", "sam_gain", "curves", "pareto"}
    assert set(files) == tables | {name + suffix for name in drawn for suffix in (".png", ".pdf")}
    again = command("sweep", str(sweep), words)
    assert again.returncode == 0 and ", 0 to do" in again.stdout
    assert command("report", str(sweep), words).returncode == 0
    assert files == {p.name: p.read_bytes() for p in (results / "quickstart").rglob("*.*")}


def test_a_record_of_another_protocol_in_a_runs_place_is_refused(quickstart):
    """It cannot be passed off as this sweep's: its id says what it is (the gate itself: test_report)."""
    sweep, results, words = quickstart
    store = Store(results)
    run = ordered(runs_of(load(sweep)))[0]
    other = command(
        "run", "protocol=quick_recall", f"mixer={run.mixer.name}", "mixer.heads=2", "protocol.budget.steps=2", words
    )
    assert other.returncode == 0, other.stderr
    path = store.folder(run.id) / "record.json"
    mine = path.read_bytes()
    odd = next(p for p in (results / "runs").glob("*/record.json") if b'"steps":2}' in p.read_bytes())
    path.unlink()
    path.write_bytes(odd.read_bytes())
    refused = command("report", str(sweep), words)
    path.write_bytes(mine)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert run.id in refused.stderr


@pytest.mark.data
def test_the_whole_chain_runs_on_real_data(tmp_path):
    """Masked LM, SST-2, CoLA, MNLI -> MRPC and Tiny ImageNet, cut to a toy; every run leaves its record."""
    words = f"where.results={tmp_path / 'results'}"
    path = ROOT / "sweeps" / "cut.yaml"
    done = command("sweep", str(path), "--workers", "2", words)
    assert done.returncode == 0, done.stdout + done.stderr
    table = command("report", str(path), words)
    assert table.returncode == 0, table.stderr
    store, runs = Store(tmp_path / "results"), ordered(runs_of(load(path)))
    records = {run.id: store.record(run.id) for run in runs}
    assert {record.outcome for record in records.values()} == {"ok"}
    for run in runs:
        if run.label == "cut_mlm":
            curve = records[run.id].curve
            assert curve[-1][1] < curve[0][1] - 0.5  # it learns
        if run.label == "cut_mrpc":
            assert run.parent.label == "cut_mnli_small" and run.parent.parent.label == "cut_mlm"
        assert records[run.id].hashes.shared_init and (store.folder(run.id) / "items.parquet").exists()

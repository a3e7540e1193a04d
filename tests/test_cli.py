"""The command line as users meet it: one line for what they can mend, sweeps that outlive Ctrl-C."""

import dataclasses
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from bench import Refusal, cli, compose, launch, worker
from bench.compose import make_run, make_where
from bench.record import dump
from bench.registry import make_task, require_metrics
from bench.run import execute
from bench.store import Store
from bench.sweep import grid, load, ordered
from bench.tasks.base import Places
from bench.where import shares
from bench.words import duration
from tests.conftest import forget
from tests.standing import launcher, standing
from tests.test_store import a_record, content
from tests.test_sweep import PLAIN, sweep_file

ROOT = Path(__file__).parents[1]


@pytest.fixture
def call(monkeypatch, capsys):
    """(exit code, stdout, stderr) of `mixerbench` with these words, in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def called(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mixerbench", *map(str, words)])
        capsys.readouterr()
        code = cli.main()
        return code, *capsys.readouterr()

    yield called
    for number, handler in handlers.items():
        signal.signal(number, handler)


def the_line(answer: tuple[int, str, str]) -> str:
    code, _, err = answer
    assert code == 2 and err.startswith("mixerbench: ") and err.count("\n") == 1 and err.endswith("\n"), answer
    return err


# Refusals -----------------------------------------------------------------------------------------------------------

QUICK = ["run", "protocol=quick_copying", "mixer=low_rank"]
BAD = {
    "unknown mixer": ([*QUICK[:2], "mixer=mamba"], ["mamba", "toeplitz"]),
    "unknown protocol": (["run", "protocol=quick", "mixer=dense"], ["'quick'", "quick_digits"]),
    "no mixer": (QUICK[:2], ["mixer=", "toeplitz"]),
    "unknown key": ([*QUICK, "protocol.optimiser.lrr=1"], ["lrr", "lr, betas"]),
    "unknown top key": ([*QUICK, "optimiser.lr=1"], ["optimiser.lr", "protocol.…"]),
    "key of a mixer": ([*QUICK, "mixer.order=1"], ["order", "rank"]),
    "word without a value": ([*QUICK, "fast"], ["fast", "key=value"]),
    "text for a number": ([*QUICK, "protocol.optimiser.lr=fast"], ["protocol.optimiser.lr", "float", "fast"]),
    "text for a mixer's number": ([*QUICK, "mixer.rank=big"], ["rank", "int", "big"]),
    "negative steps": ([*QUICK, "protocol.budget.steps=-5"], ["protocol.budget.steps", "at least 1"]),
    "negative seed": ([*QUICK, "seed=-1"], ["seed", "at least 0"]),
    "heads that do not divide": ([*QUICK, "mixer.heads=5"], ["mixer.heads=5", "1, 2, 4, 8"]),
    "no SAM form": ([*QUICK[:2], "mixer=dense", "mixer.sam=true"], ["dense", "sam", "true", "false"]),
    "replica without a parent": ([*QUICK, "replica=1"], ["replica 1", "quick_copying"]),
    "backend on a CPU": ([*QUICK, "where.backend=mamba_ssm"], ["where.backend=mamba_ssm", "cpu", "torch"]),
    "unknown backend": ([*QUICK, "where.backend=cublas"], ["cublas", "triton", "mamba_ssm"]),
    "unknown where": ([*QUICK, "where.gpu=0"], ["gpu", "device"]),
    "interpolation": ([*QUICK, "where.data=${oc.env:HOME}"], ["interpolation", "${oc.env:HOME}"]),
    "no such sweep": (["sweep", "sweeps/nowhere.yaml"], ["sweeps/nowhere.yaml"]),
    "no workers": (["sweep", "sweeps/quickstart.yaml", "--workers", "0"], ["--workers", "at least 1"]),
    "run's key for a sweep": (["sweep", "sweeps/quickstart.yaml", "seed=1"], ["'seed'", "where.…"]),
    "report without records": (["report", "sweeps/quickstart.yaml"], ["quickstart", "no records"]),
    "unknown data set": (["data", "fetch", "imagenets"], ["imagenets", "simplewiki"]),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line_and_nothing_is_written(call, tmp_path, monkeypatch, case):
    monkeypatch.chdir(ROOT)
    words, parts = BAD[case]
    message = the_line(call(*words, f"where.results={tmp_path / 'results'}", "where.device=cpu"))
    assert all(part in message for part in parts), message
    assert list(tmp_path.iterdir()) == []


def test_bad_options_are_refused_by_argparse(call):
    options = (["--stop-after", "soon"], ["--stop-after", "-3m"], ["--workers", "two"], ["--wrokers=2"])
    for words in options:
        with pytest.raises(SystemExit) as caught:
            call("sweep", "sweeps/quickstart.yaml", *words)
        assert caught.value.code == 2
    assert [duration(t) for t in ("90s", "1.5m", "2h")] == [90, 90, 7200]


def test_interpolation_in_a_yaml_is_refused(call, tmp_path):
    path = sweep_file(tmp_path, question="${oc.env:HOME}")
    assert "interpolation" in the_line(call("sweep", path, f"where.results={tmp_path / 'results'}"))
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("verb", ["run", "sweep"])
def test_missing_data_say_what_where_and_how(call, tmp_path, monkeypatch, verb):
    results = tmp_path / "results"
    path = sweep_file(tmp_path, protocols=["quick_copying", "mini_mlm"])
    words = {"run": ["run", "protocol=mini_mlm", "mixer=identity"], "sweep": ["sweep", path]}[verb]
    monkeypatch.delenv("MIXERBENCH_DATA", raising=False)
    message = the_line(call(*words, f"where.results={results}", "where.device=cpu"))
    assert "simplewiki" in message and "mixerbench data fetch simplewiki" in message and "is not set" in message
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("MIXERBENCH_DATA", str(tmp_path / "empty"))
    assert str(tmp_path / "empty") in the_line(call(*words, f"where.results={results}", "where.device=cpu"))
    assert not results.exists()


@pytest.mark.parametrize("verb", ["run", "sweep", "sweep --on"])
def test_a_batch_that_the_devices_cannot_share_is_refused_before_anything_runs(call, tmp_path, verb):
    results, path = tmp_path / "results", sweep_file(tmp_path)
    asked = ["run", "protocol=quick_copying", "mixer=identity"] if verb == "run" else ["sweep", path]
    asked += ["--on", str(ROOT / "slurm" / "eight_gpus.yaml")] if verb == "sweep --on" else []
    message = the_line(call(*asked, f"where.results={results}", "where.device=cpu", "where.devices=7"))
    assert message.startswith("mixerbench: quick_copying") and "a batch of 64 cannot be cut into 7 devices" in message
    assert not results.exists()


def test_results_that_cannot_be_written_are_one_line(call, tmp_path):
    (tmp_path / "file").touch()
    path, root = sweep_file(tmp_path), tmp_path / "file" / "results"
    for words in ([*QUICK, "protocol.budget.steps=2"], ["sweep", path]):
        message = the_line(call(*words, f"where.results={root}", "where.device=cpu"))
        assert str(root) in message and "where.results" in message
    (tmp_path / "records.jsonl").write_text("")
    assert str(root) in the_line(call("merge", tmp_path / "records.jsonl", "--into", root))


def test_a_record_cut_in_half_is_one_line(call, tmp_path):
    run = make_run("quick_copying", "low_rank", {}, 0, 0)
    path = Store(tmp_path / "results").open(run.id) / "record.json"
    mixers = [{"name": "low_rank"}]
    sweep = sweep_file(tmp_path, mixers=mixers, varies={})
    for text in ('{"schema": 1, "id"', "", "[]"):
        path.write_text(text)
        before = content(tmp_path)
        for words in (QUICK, ["sweep", sweep], ["plan", sweep]):
            where = [f"where.results={tmp_path / 'results'}", "where.device=cpu"]
            message = the_line(call(*words, *where))
            assert str(path) in message, (words, text)
        assert content(tmp_path) == before


DAMAGE = {
    "another schema": lambda values: values | {"schema": 99},
    "no metrics": lambda values: {key: value for key, value in values.items() if key != "metrics"},
    "a metric that is text": lambda values: values | {"metrics": {"accuracy": "good"}},
    "a metric that is no number": lambda values: values | {"metrics": {"accuracy": float("nan")}},
    "no time": lambda values: values | {"finished": "once"},
    "no mapping": lambda values: [],
    "another run's": lambda values: json.loads(dump(a_record(1))),
}


@pytest.mark.parametrize("case", list(DAMAGE))
def test_all_verbs_say_the_same_of_a_record_that_they_do_not_take(call, tmp_path, case):
    path = sweep_file(tmp_path, mixers=[{"name": "identity"}], varies={})
    record, store = a_record(0), Store(tmp_path / "results")
    store.finish(record, {})
    file, words = store.folder(record.id) / "record.json", [path, f"where.results={store.root}"]
    assert "1 runs: 1 ok" in call("status", *words)[1]
    file.write_text(json.dumps(DAMAGE[case](json.loads(file.read_text()))))
    said = {the_line(call(verb, *words)).removeprefix("mixerbench: ").strip() for verb in ("plan", "sweep", "report")}
    assert len(said) == 1 and str(file) in (line := said.pop())
    code, out, _ = call("status", *words)
    assert code == 0 and "1 runs: 0 ok, 1 damaged" in out and f": {line}\n" in out


def test_a_results_folder_that_is_not_there_is_said_first(call, tmp_path):
    path, root = sweep_file(tmp_path), tmp_path / "results"
    run = grid(load(path))[0].id
    for words in (["status"], ["logs"], ["logs", run], ["retry"], ["cancel"], ["plan"]):
        words = [words[0], path, *words[1:], f"where.results={root}"]
        code, out, _ = call(*words)
        assert code == 0 and f"results folder {root} does not exist yet" in out.splitlines()[0], (words, out)
        root.mkdir()
        assert "does not exist" not in call(*words)[1]
        root.rmdir()


def test_a_file_is_no_results_folder_to_any_verb(call, tmp_path):
    path, file = sweep_file(tmp_path), tmp_path / "README.md"
    file.touch()
    verbs = [[verb, path] for verb in ("sweep", "status", "logs", "retry", "cancel", "plan", "report")]
    verbs += [QUICK, ["show", *QUICK[1:]], ["show", "0123"], ["data", "fetch", "simplewiki"], ["speed", "identity"]]
    for words in verbs:
        for root in (file, file / "below"):
            message = the_line(call(*words, f"where.results={root}", "where.device=cpu"))
            assert f"where.results={root}: {file} is a file; name a folder" in message, words


def test_report_says_where_it_looked_and_what_completes_this_sweep(call, tmp_path):
    path, words = sweep_file(tmp_path), [f"where.results={tmp_path / 'r'}", "where.device=cpu"]
    message = the_line(call("report", path, *words))
    assert f" in {tmp_path / 'r'}; " in message
    assert f"`{shlex.join(['mixerbench', 'sweep', str(path), *words])}` completes it" in message
    Store(tmp_path / "r").finish(a_record(0), {})
    path = sweep_file(tmp_path, mixers=[{"name": "identity"}], varies={}, seeds=[0, 1])
    assert call("report", path, *words)[0] == 0
    text = (tmp_path / "r" / "x" / "table.md").read_text()  # the same records, the same bytes, wherever they lie
    assert "`mixerbench sweep sweeps/x.yaml` completes it" in text and str(tmp_path) not in text


def test_a_metric_that_is_not_there_is_refused_before_the_first_run(call, tmp_path):
    wrong = {"protocol": "quick_copying", "metric": "acuracy"}
    path = sweep_file(tmp_path, columns=[wrong], family=PLAIN["family"] | {"primary": wrong})
    message = the_line(call("sweep", path, f"where.results={tmp_path / 'results'}", "where.device=cpu"))
    assert "'acuracy'" in message and "has: accuracy, loss" in message
    assert not (tmp_path / "results").exists()


SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_committed_sweeps_ask_for_what_their_tasks_measure(path):
    sweep = load(path)
    require_metrics([(column.protocol, column.metric) for column in sweep.columns], ordered(grid(sweep)))


def test_committed_records_have_what_their_tasks_measure():
    """A folder may hold the runs of several sweeps, but none that no committed sweep asks for."""
    known = {run.id: run for path in SWEEPS for run in ordered(grid(load(path)))}
    for file in (ROOT / "results").glob("*/records.jsonl"):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            task = make_task(known[record["id"]], Places(None, Path()))
            names = {name for part in task.held_out() for name in task.names(part)}
            assert {name.removeprefix("ema_") for name in record["metrics"]} == names, (file, record["id"])


def test_a_metric_of_the_selection_that_is_not_there_is_refused():
    (run, *_) = [run for run in grid(load(ROOT / "sweeps" / "quick_tuned.yaml")) if run.protocol.tune]
    tune = run.protocol.tune
    tune = dataclasses.replace(tune, selection=dataclasses.replace(tune.selection, metric="lost"))
    wrong = dataclasses.replace(run, protocol=dataclasses.replace(run.protocol, tune=tune))
    with pytest.raises(Refusal, match=r"protocol.tune.selection.metric must be one of accuracy, loss, got 'lost'"):
        require_metrics([], [wrong])


def test_output_that_nobody_reads_is_no_error():
    """As of `mixerbench check … | head`, which has gone before the end."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-W", "ignore", "-m", "bench.cli", "check", "identity", "heads=2"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


# Data ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A configs folder with a text task 'tiny' with files in tmp_path/data; its vocabulary is to be made."""
    configs, data = tmp_path / "configs", tmp_path / "data"
    for file in (ROOT / "configs").rglob("*.yaml"):
        target = configs / file.relative_to(ROOT / "configs")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(file.read_text())
    values = yaml.safe_load((configs / "task" / "masked_lm_simplewiki.yaml").read_text())
    data.mkdir()
    splits = {}
    for split in ("train", "validation"):
        words = [hashlib.md5(bytes([k])).hexdigest()[:6] for k in range(60)]
        file = data / f"{split}.parquet"
        pq.write_table(pa.table({"text": [" ".join(words[k:] + words[:k]) for k in range(20)]}), file)
        splits[split] = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}
    values |= {"length": 32, "data": values["data"] | {"name": "tinytexts", "splits": splits}}
    (configs / "task" / "tiny.yaml").write_text(yaml.safe_dump(values))
    mlm = (configs / "protocol" / "mini_mlm.yaml").read_text().replace("masked_lm_simplewiki", "tiny")
    own = mlm.replace("layers: 6, width: 256", "layers: 1, width: 16").replace("1500, batch: 512", "2, batch: 8")
    (configs / "protocol" / "tiny.yaml").write_text(own)
    monkeypatch.setattr(compose, "CONFIGS", configs)
    monkeypatch.setenv("MIXERBENCH_DATA", str(data))
    forget()
    yield tmp_path
    forget()


def test_from_a_corpus_to_a_record_and_what_may_be_wrong_with_the_files(call, tiny):
    data, yaml_file, results = tiny / "data", tiny / "configs" / "task" / "tiny.yaml", tiny / "results"
    words = ["run", "protocol=tiny", "mixer=identity", f"where.results={results}", "where.device=cpu"]
    code, out, err = call("data", "vocab", "tiny", "--size", "90", "--out", data / "words.txt")
    assert code == 0, err
    text = (data / "words.txt").read_bytes()
    pin = yaml.safe_load(out.splitlines()[-1])
    assert pin == {"vocabulary": {"file": "words.txt", "sha256": hashlib.sha256(text).hexdigest(), "size": 90}}
    assert len(text.splitlines()) == 90
    assert "is there already" in the_line(call("data", "vocab", "tiny", "--size", "90", "--out", data / "words.txt"))
    assert "text task" in the_line(call("data", "vocab", "copying", "--size", "90", "--out", data / "other.txt"))
    assert "--size" in the_line(call("data", "vocab", "tiny", "--size", "-5", "--out", data / "other.txt"))
    assert "no folder" in the_line(call("data", "vocab", "tiny", "--size", "90", "--out", data / "sub" / "words.txt"))
    yaml_file.write_text(yaml.safe_dump(yaml.safe_load(yaml_file.read_text()) | pin))
    forget()
    code, out, _ = call("data", "fetch", "tinytexts")
    assert code == 0 and out.count("verified") == 3

    whole = (data / "train.parquet").read_bytes()
    (data / "train.parquet").write_bytes(whole[:-1] + b"x")
    message = the_line(call(*words))
    assert "train.parquet" in message and "not the pinned file" in message and "data fetch tinytexts" in message
    code, out, _ = call("data", "fetch", "tiny")
    assert code == 1 and "other content" in out
    assert not list(results.glob("runs"))

    # Pinned, but no Parquet: only the pins of a careless yaml get there.
    (data / "train.parquet").write_bytes(whole[: len(whole) // 2])
    old, new = (hashlib.sha256(part).hexdigest() for part in (whole, whole[: len(whole) // 2]))
    good = yaml_file.read_text()
    yaml_file.write_text(good.replace(old, new))
    forget()
    message = the_line(call(*words))
    assert "train.parquet is not readable Parquet" in message and not list(results.glob("runs"))

    yaml_file.write_text(good)
    forget()
    (tiny / "source").mkdir()
    (tiny / "source" / "train.parquet").write_bytes(whole)
    for name in ("validation.parquet", "words.txt"):
        (data / name).rename(tiny / "source" / name)
    code, out, _ = call("data", "fetch", "tinytexts", "--from", tiny / "source")
    assert code == 0 and out.count("copied") == 3 and (data / "train.parquet").read_bytes() == whole
    code, out, err = call(*words, "protocol.precision=fp32")
    assert code == 0 and err == "" and "record: " in out, (out, err)
    assert Path(out.split("record: ")[1].strip()).exists()
    code, out, _ = call(*words, "protocol.precision=fp32")
    assert code == 0 and "in the store already" in out


# Help ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["report", "--help"], ["data", "fetch", "--help"]])
def test_help_loads_nothing_heavy(words):
    code = (
        "import atexit, sys; from bench import cli; sys.argv = ['mixerbench', *sys.argv[1:]]\n"
        "heavy = 'torch lightning hydra omegaconf numpy pandas pyarrow matplotlib datasets rich'.split()\n"
        "atexit.register(lambda: print([m for m in heavy if m in sys.modules], file=sys.stderr))\n"
        "sys.exit(cli.main())"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: mixerbench") and done.stderr == "[]\n"


# Sweeps -------------------------------------------------------------------------------------------------------------


def test_what_is_given_up_is_named_with_its_reason_and_remedy(call, tmp_path, monkeypatch):
    path, results = sweep_file(tmp_path), Store(tmp_path / "results")
    run = ordered(grid(load(path)))[0]
    for _ in range(3):
        results.fail(run.id, "error", "ValueError: bad luck\nTraceback")
    single = ["run", "protocol=quick_copying", "mixer=identity", "mixer.heads=2", "protocol.budget.steps=2"]
    for words in (["sweep", path], single):
        code, _, err = call(*words, f"where.results={results.root}", "where.device=cpu")
        assert code == 1 and err.count("\n") == 1
        assert run.id in err and "ValueError: bad luck" in err and "given up after 3 failures" in err
        assert "`mixerbench retry` lets it be tried again" in err
    untils = []
    monkeypatch.setattr(launch, "local", lambda *given: untils.append(given[-1]) or 0)
    code, _, err = call("sweep", path, f"where.results={results.root}", "where.retries=3", "--stop-after", "0s")
    assert code == 1 and "given up" not in err and "ValueError: bad luck" in err
    assert untils[0] <= time.time()  # no time at all, not: as much as you like


def test_a_refusal_in_a_worker_is_the_launchers_line(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MIXERBENCH_DATA", raising=False)
    path = sweep_file(tmp_path, protocols=["mini_mlm"], varies={})
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    code = worker.main([str(path), "--until", "inf", "--where", f"where.results={tmp_path / 'r'}", "where.device=cpu"])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    err = capsys.readouterr().err
    assert code == 2 and err.startswith("mixerbench: data set simplewiki") and err.count("\n") == 1
    assert not [p for p in (tmp_path / "r").rglob("*") if p.name.startswith(("failure", "record"))]

    def ended(code: str) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", code])
        process.wait()
        return process

    log = tmp_path / "log"
    log.write_text(f"noise\n{err}late noise\n")
    with pytest.raises(Refusal, match="data set simplewiki"):
        launch.verdict({tmp_path / "other": ended(""), log: ended("import sys; sys.exit(2)")})
    log.write_text("Killed")
    assert launch.verdict({log: ended("import os; os.kill(os.getpid(), 9)")}) == 1
    assert str(log) in capsys.readouterr().err
    assert launch.verdict({log: ended("")}) == 0


def test_a_sweep_with_a_broken_run_finishes_the_others(call, tmp_path):
    """A folder where the checkpoint should be makes one run fail in a real worker, as often as it may."""
    path = sweep_file(tmp_path, seeds=[0, 1, 2])
    broken, *others = ordered(grid(load(path)))
    results = Store(tmp_path / "results")
    (results.open(broken.id) / "checkpoint.pt").mkdir()
    code, out, err = call("sweep", path, f"where.results={results.root}", "where.device=cpu", "where.retries=1")
    assert code == 1 and err.count("\n") == 1 and broken.id in err and "given up after 2 failures" in err
    assert len(results.failures(broken.id)) == 2 and all(results.has(r.id) for r in others)
    lines = out.splitlines()
    assert lines[0].endswith("3 runs, 0 in the store, 3 to do")
    for n, line in enumerate(lines[1:], 1):
        wanted = rf"\[{n}/3\] quick_copying.*identity.* seed {n}: accuracy=.* loss=.* \(\d+\.\d s\)"
        assert re.fullmatch(wanted, line), line
    assert len(lines) == 3
    (results.folder(broken.id) / "checkpoint.pt").rmdir()
    for note in results.folder(broken.id).glob("failure-*.json"):
        note.unlink()
    again = ["run", "protocol=quick_copying", "mixer=identity", "mixer.heads=2", "protocol.budget.steps=2"]
    assert call(*again, f"where.results={results.root}", "where.device=cpu")[0] == 0
    code, out, err = call("sweep", path, f"where.results={results.root}", "where.device=cpu")
    assert (code, err) == (0, "") and out.endswith("3 runs, 3 in the store, 0 to do\n")


def alive(parent: int) -> list[int]:
    """Living child processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
            if int(fields[1]) == parent and fields[0] not in "ZX":
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for(what, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_ctrl_c_leaves_nobody_behind_and_the_same_command_goes_on_bitwise(call, tmp_path):
    """Two workers, four runs; stopped while both are at work, then finished by another, each run trained once."""
    path = sweep_file(tmp_path, seeds=[0, 1, 2, 3], varies={"budget.steps": [400]})
    runs, results = ordered(grid(load(path))), Store(tmp_path / "results")
    words = ["sweep", str(path), f"where.results={results.root}", "where.device=cpu"]
    command = [*launcher(standing(tmp_path, 99)), *words, "--workers", "2"]
    pipe, own = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["env", "--default-signal=INT", *command]  # what runs the tests in the background may ignore it
    with subprocess.Popen(command, stderr=pipe, stdout=pipe, text=True, env=own) as started:
        wait_for(lambda: sum(results.progress(r.id) == 98 / 400 for r in runs) == 2, 300)
        workers = alive(started.pid)
        started.send_signal(signal.SIGINT)
        _, err = started.communicate(timeout=300)
    assert len(workers) == 2
    assert started.returncode == 130 and err.startswith("stopping: ") and err.count("\n") == 1
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    assert not any(results.leased(r.id) for r in runs)
    stopped = [r for r in runs if (results.folder(r.id) / "checkpoint.pt").exists()]
    assert len(stopped) == 2 and not any(results.has(r.id) or results.failures(r.id) for r in runs)

    code, out, err = call(*words)
    assert (code, err) == (0, "") and out.count("seed ") == 4
    logs = "".join(log.read_text() for log in (results.root / "logs").iterdir())
    assert sorted(re.findall(r"seed (\d):", logs)) == ["0", "1", "2", "3"]
    undisturbed = make_where({"where.results": str(tmp_path / "whole"), "where.device": "cpu"})
    whole, resumed = execute(stopped[0], undisturbed, lambda: False), Store(results.root).record(stopped[0].id)
    assert (whole.metrics, whole.curve) == (resumed.metrics, resumed.curve)
    assert json.dumps(whole.metrics) == json.dumps(resumed.metrics)


def test_a_launcher_that_fails_takes_its_workers_along(tmp_path, monkeypatch, where):
    """A damaged record of a finished run shows up only while the launcher watches."""
    path, seen = sweep_file(tmp_path), []
    runs, results = ordered(grid(load(path))), Store(Path(where.results))

    def broken(processes, *_):
        seen.extend(processes)
        raise Refusal("a damaged record")

    monkeypatch.setattr(launch, "watch", broken)
    with pytest.raises(Refusal):
        launch.local(path, None, runs, results, where, [f"where.results={where.results}"], [""], float("inf"))
    assert [p.poll() is not None for p in seen] == [True]


def test_workers_share_the_gpus_that_are_visible(monkeypatch):
    on_gpus = make_where({"where.device": "cuda"})
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert shares(on_gpus, 6) == ["0", "1", "2", "3", "0", "1"]
    assert shares(dataclasses.replace(on_gpus, devices=2), 3) == ["0,1", "2,3", "0,1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-7")
    assert shares(on_gpus, 3) == ["5", "GPU-7", "5"]
    assert shares(dataclasses.replace(on_gpus, device="cpu"), 2) == ["", ""]


def test_a_worker_sees_its_share(tmp_path, monkeypatch, where):
    seen = []

    def started(command, env, **rest):
        seen.append(env.get("CUDA_VISIBLE_DEVICES"))
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=started))
    launch.local(tmp_path / "x.yaml", None, [], Store(Path(where.results)), where, [], ["1", "", "0"], float("inf"))
    assert seen == ["1", None, "0"]


def test_workers_get_the_seeds_that_are_asked_for(tmp_path, monkeypatch, where):
    path, seen = sweep_file(tmp_path), []

    def started(command, env, **rest):
        seen.append(command[2:])
        return subprocess.Popen([sys.executable, "-c", ""])

    monkeypatch.setattr(launch, "subprocess", SimpleNamespace(Popen=started))
    for seeds in (None, [1, 0]):
        launch.local(path, seeds, [], Store(Path(where.results)), where, [], [""], float("inf"))
    assert [command[1:4] for command in seen] == [[str(path), "--until", "inf"], [str(path), "--seeds", "1,0"]]


def test_a_worker_trains_the_seeds_that_it_is_given(tmp_path, monkeypatch):
    path, seen = sweep_file(tmp_path, seeds=[0, 1]), []
    monkeypatch.setattr(worker, "work", lambda queue, stop: seen.append({run.seed for run in queue.runs}))
    words = ["--where", f"where.results={tmp_path}", "where.device=cpu"]
    assert worker.main([str(path), *words]) == worker.main([str(path), "--seeds", "1", *words]) == 0
    assert seen == [set(load(path).seeds), {1}] and len(seen[0]) > 1


def test_seeds_are_for_this_machine_and_of_the_sweep(call, tmp_path):
    path = sweep_file(tmp_path)
    code, _, error = call("sweep", path, "--seeds", "7")
    assert code == 2 and "--seeds 7 is none of" in error
    code, _, error = call("sweep", path, "--seeds", "0", "--on", "slurm/template.yaml")
    assert code == 2 and "are for this machine" in error


def test_merge_and_its_refusal(call, tmp_path):
    Store(tmp_path / "there").finish(a_record(0), {})
    code, out, _ = call("merge", tmp_path / "there", "--into", tmp_path / "x")
    assert code == 0 and "1 new, 1 in all" in out
    before = content(tmp_path / "x")
    assert "no records" in the_line(call("merge", tmp_path / "nowhere", "--into", tmp_path / "x"))
    assert content(tmp_path / "x") == before


def test_pilots_without_their_data_are_refused_before_a_rank_starts(call, tmp_path, monkeypatch):
    monkeypatch.delenv("MIXERBENCH_DATA", raising=False)
    path, results = sweep_file(tmp_path, protocols=["mini_mlm"]), tmp_path / "r"
    words = ["--pilot", "where.device=cpu", "where.devices=2", f"where.results={results}"]
    assert "data set simplewiki: " in the_line(call("plan", path, *words))
    assert not results.exists()


def test_a_sweep_that_is_not_there_is_refused_with_those_that_are(call, tmp_path):
    for name in ("b.yaml", "a.yaml", "no.txt"):
        (tmp_path / name).touch()
    assert the_line(call("plan", tmp_path / "c.yaml")).endswith("c.yaml; there are: a.yaml, b.yaml\n")
    message = the_line(call("plan", tmp_path))
    assert f"{tmp_path} is a folder, name a file; there are: {tmp_path / 'a.yaml'}, {tmp_path / 'b.yaml'}" in message

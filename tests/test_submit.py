"""What a submission says to Slurm and what it makes of the answers. A real Slurm: test_slurm.py, test_faults.py."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from bench import Refusal, slurm, submit
from bench.cluster import Cluster, load, megabytes, requests
from bench.compose import ROOT, make_where
from bench.store import Store, take
from bench.submit import Submission, command, prepare, script, send, submissions
from tests.test_store import RUN

GOLDEN = ROOT / "tests" / "golden" / "slurm_job.txt"
HOSTILE = "$(touch HIT); touch HIT; `touch HIT` '\" && touch HIT #"


def cluster(**changes) -> Cluster:
    return dataclasses.replace(load(ROOT / "slurm" / "virtual.yaml"), **changes)


def refusal(call, *arguments, **keys) -> str:
    with pytest.raises(Refusal) as caught:
        call(*arguments, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def submission(tmp_path) -> Submission:
    return a_submission(tmp_path)


def a_submission(tmp_path: Path, **changes) -> Submission:
    """On disk, of a sweep of one run; the snapshot is the real code."""
    (tmp_path / "x.yaml").write_text("question: Which?\n")
    where = make_where({"where.results": str(tmp_path / "results"), "where.device": "cpu"})
    (tmp_path / "results" / "slurm" / "x").mkdir(parents=True, exist_ok=True)
    return prepare(tmp_path / "x.yaml", "x", submit.RUNS, ["where.device=cpu"], where, cluster(**changes), [RUN])


# Cluster file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "slurm").glob("*.yaml")), ids=lambda p: p.name)
def test_the_cluster_files_here_are_whole(path):
    assert load(path).cpus >= 1


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"partion": "main"}, ["cluster.partion", "partition, account"]),
        ({"partition": "main\n#SBATCH --uid=0\ntouch HIT"}, ["cluster.partition", "control character"]),
        ({"modules": ["cuda\rtouch HIT"]}, ["cluster.modules", "control character"]),
        ({"setup": ["true\ntouch HIT"]}, ["cluster.setup", "control character"]),
        ({"partition": 3}, ["cluster.partition", "str"]),
        ({"memory": "4 GB"}, ["cluster.memory", "4G"]),
        ({"time": 0}, ["cluster.time", "at least 1"]),
        ({"time": 1, "warn": 60}, ["cluster.warn", "60 s"]),
        ({"qos": "${oc.env:HOME}"}, ["interpolation"]),
    ],
)
def test_what_a_cluster_file_may_not_say_is_one_line(tmp_path, changes, parts):
    values = yaml.safe_load((ROOT / "slurm" / "virtual.yaml").read_text())
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values | changes))
    message = refusal(load, tmp_path / "c.yaml")
    assert all(part in message for part in parts), message


def test_a_cluster_file_lacks_no_key(tmp_path):
    values = yaml.safe_load((ROOT / "slurm" / "virtual.yaml").read_text())
    for key in values:
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if k != key}))
        assert f"cluster.{key}" in refusal(load, tmp_path / "c.yaml")


def test_memory_is_read_as_slurm_reads_it():
    assert [megabytes(m) for m in ("512", "512M", "2G", "1024K", "1T")] == [512, 512, 2048, 1, 1024**2]


@pytest.mark.parametrize(
    ("verb", "changes", "part"),
    [
        (["sweep"], {"side_by_side": 2}, "cluster.side_by_side: a run has all of its nodes"),
        (["sweep"], {"container": ["apptainer"]}, "cluster.container: srun is not inside"),
        (["plan", "--pilot"], {}, "pilots are measured on one node"),
    ],
    ids=["side_by_side", "container", "pilots"],
)
def test_what_does_not_go_with_several_nodes_is_one_line(tmp_path, verb, changes, part):
    values = yaml.safe_load((ROOT / "slurm" / "virtual.yaml").read_text())
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values | changes))
    words = [verb[0], str(ROOT / "sweeps" / "quickstart.yaml"), *verb[1:], "--on", str(tmp_path / "c.yaml")]
    words += ["where.nodes=2", "where.device=cpu", f"where.results={tmp_path / 'results'}"]
    run = [sys.executable, "-m", "bench.cli", *words]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "where.nodes=2" in done.stderr and part in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "results").exists()


SHOWN = "PartitionName=main\n   MaxNodes=UNLIMITED MaxTime=01:00:00 MinNodes=0\n   State=UP TotalCPUs=8 TotalNodes=4"


def test_limits_that_would_pend_or_crawl_are_refused(monkeypatch):
    monkeypatch.setattr(slurm, "ask", lambda words, seconds=0: SHOWN)
    where = make_where({"where.threads": 2})
    assert "more than main has or allows, 4" in refusal(submit.check, cluster(), make_where({"where.nodes": 5}))
    for odd in ("100%", "a\\b", "a\nb"):
        assert "Slurm cannot write below" in refusal(submit.check, cluster(), make_where({"where.results": odd}))
    assert "cluster.cpus=1" in refusal(submit.check, cluster(cpus=1), where)
    assert "limit, 60" in refusal(submit.check, cluster(time=61), where)
    submit.check(cluster(time=60), where)


@pytest.mark.parametrize(
    ("gres", "few"),
    [
        ("gpu", True),
        ("gpu:2", False),
        ("gpu:h100:1", True),
        ("gpu:h100:2", False),
        ("gpu:a100", True),
        ("gpu:a100:1,gpu:h100:1", False),
        ("shard:1,gpu:1", True),
        ("", False),  # the cluster's choice
        ("shard:1", False),
    ],
)
def test_a_task_has_a_gpu_for_each_device_of_a_run(gres, few, monkeypatch):
    monkeypatch.setattr(slurm, "ask", lambda words, seconds=0: SHOWN)
    where = make_where({"where.device": "cuda", "where.devices": 2})
    if few:
        assert f"cluster.gres='{gres}' gives a task fewer GPUs" in refusal(submit.check, cluster(gres=gres), where)
    else:
        submit.check(cluster(gres=gres), where)
    submit.check(cluster(gres=gres), make_where({"where.device": "cpu", "where.devices": 2}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1:30", 1.5), ("02:00:00", 120), ("1-00:00:00", 1440), ("1-02", 1560), ("UNLIMITED", float("inf"))],
)
def test_slurms_times(text, expected):
    assert slurm.minutes(text) == expected


# Script and command -------------------------------------------------------------------------------------------------


def test_the_batch_script_and_the_command_are_these(submission, monkeypatch, tmp_path):
    """To take a wanted change over: delete the file and run this test."""
    monkeypatch.setattr(submit.sys, "executable", "/opt/venv/bin/python")
    own = cluster(partition="gpu", gres="gpu:1", memory="32G", modules=("cuda/12.4",), setup=("source /etc/profile",))
    own = dataclasses.replace(own, container=("apptainer", "exec", "image file.sif"))
    text = script(dataclasses.replace(submission, cluster=own))
    text += "\nsbatch\n" + "\n".join(f"  {word}" for word in command(submission.folder, submission.name, own, 1))
    for value, name in ((submission.folder.name, "UUID"), (submission.code, "CODE"), (submission.name, "mb-UUID8")):
        text = text.replace(value, name)
    text = text.replace(str(tmp_path), "/home/me") + "\n"
    if not GOLDEN.exists():
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_nothing_but_setup_is_a_command(tmp_path):
    """Values with every quoting trick are run as the batch script would: none of them is executed."""
    odd = tmp_path / HOSTILE.replace("/", "")
    odd.mkdir()
    own = {"modules": (HOSTILE,), "python": "echo"}
    written = a_submission(odd, **own, setup=("echo set up > SET_UP",))
    environment = {**os.environ, "BASH_FUNC_module%%": '() { echo module "$@"; }'}
    job = ["bash", written.folder / "job.sh"]
    done = subprocess.run(job, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert f"module load {HOSTILE}" in done.stdout and f"-m bench.element {written.folder}" in done.stdout
    assert (tmp_path / "SET_UP").exists()
    assert not list(tmp_path.rglob("HIT")) and not list(ROOT.glob("HIT"))


def test_a_setup_line_that_fails_ends_the_task(tmp_path):
    written = a_submission(tmp_path, setup=("false",), python="touch")
    assert subprocess.run(["bash", written.folder / "job.sh"], cwd=tmp_path).returncode == 1
    assert not list(tmp_path.rglob("bench.element"))


def test_empty_keys_are_left_to_the_cluster():
    words = requests(cluster())
    assert words == ["--partition=main", "--cpus-per-task=2", "--time=10", "--signal=B:USR2@60"]
    assert not any("wckey" in word or "USR1" in word for word in words)


def test_files_of_a_submission_are_their_owners_alone(tmp_path):
    old = os.umask(0o077)
    try:
        written = a_submission(tmp_path)
    finally:
        os.umask(old)
    for path in [written.folder, *written.folder.iterdir(), written.snapshot, Store(tmp_path).open(RUN)]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_slurm_is_asked_without_what_an_outer_job_left(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_CPU_BIND", "SBATCH_PARTITION", "SQUEUE_STATES", "SLURM_CONF", "OTHER"):
        monkeypatch.setenv(name, "x")
    kept = slurm.environment()
    assert {"SLURM_CONF", "OTHER"} <= set(kept)
    assert not {"SLURM_JOB_ID", "SLURM_CPU_BIND", "SBATCH_PARTITION", "SQUEUE_STATES"} & set(kept)


# Snapshot and folder ------------------------------------------------------------------------------------------------


def test_equal_code_is_kept_once_and_a_changed_snapshot_is_refused(tmp_path):
    one, two = a_submission(tmp_path), a_submission(tmp_path)
    assert one.snapshot == two.snapshot and one.folder != two.folder and one.name != two.name
    assert len(list(one.snapshot.parent.iterdir())) == 1
    assert {s.name for s in submissions(tmp_path / "results", "x")} == {one.name, two.name}
    with open(one.snapshot / "bench" / "run.py", "a") as file:
        file.write("\n")
    assert "has been changed" in refusal(a_submission, tmp_path)


def test_submissions_of_one_second_are_in_order(tmp_path):
    names = [a_submission(tmp_path).name for _ in range(6)]
    assert [s.name for s in submissions(tmp_path / "results", "x")] == names


def test_a_submission_comes_back_as_it_was_written(submission):
    assert Submission.read(submission.folder) == submission
    (submission.folder / "submission.json").write_text("{")
    assert "is not a submission" in refusal(Submission.read, submission.folder)


# Answers ------------------------------------------------------------------------------------------------------------


def sbatch(monkeypatch, answer) -> list[list[str]]:
    """The arrays that are asked for from now on; `answer(count)` gives the job's number or raises."""
    asked = []

    def one(words, name, known, seconds=0):
        array = next(w for w in words if w.startswith("--array="))
        asked.append([w for w in words if w.startswith(("--array=", "--dependency="))])
        return answer(int(array.split("-")[-1].split("%")[0]) + 1)

    monkeypatch.setattr(slurm, "submit", one)
    return asked


def test_arrays_are_cut_to_what_the_cluster_takes(submission, monkeypatch):
    asked = sbatch(monkeypatch, lambda count: str(100 + len(asked)))
    assert send(submission, 25, 10, None) == 25
    assert asked == [["--array=0-9"], ["--array=0-9"], ["--array=0-4"]]
    assert Submission.read(submission.folder).arrays == [
        {"job": "101", "elements": 10}, {"job": "102", "elements": 10}, {"job": "103", "elements": 5}
    ]  # fmt: skip


def test_one_limit_holds_over_all_arrays(submission, monkeypatch):
    asked = sbatch(monkeypatch, lambda count: str(100 + len(asked)))
    send(submission, 25, 10, 4)
    assert asked[0] == ["--array=0-9%4"] and asked[2] == ["--array=0-4%4", "--dependency=afterany:102"]


def test_what_a_limit_holds_back_is_left_for_later(submission, monkeypatch, capsys):
    room = 13

    def limited(count):
        nonlocal room
        if count > room:
            raise slurm.Unavailable("sbatch: error: AssocMaxSubmitJobLimit")
        room -= count
        return str(room)

    sbatch(monkeypatch, limited)
    assert send(submission, 25, 10, None) == 13
    assert "12 tasks are held back" in capsys.readouterr().out
    assert sum(a["elements"] for a in Submission.read(submission.folder).arrays) == 13


def test_a_submission_that_is_refused_leaves_no_folder(submission, monkeypatch):
    def refused(count):
        raise slurm.Unavailable("sbatch: error: Invalid account")

    sbatch(monkeypatch, refused)
    assert "Invalid account" in refusal(send, submission, 5, 10, None)
    assert not submission.folder.exists()


def command_of_slurm(folder: Path, monkeypatch, name: str, text: str) -> None:
    """A program of this name that comes first."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / "bin" / name).chmod(0o700)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


@pytest.mark.parametrize("accepted", [True, False])
def test_an_sbatch_that_sleeps_is_not_waited_for(tmp_path, monkeypatch, accepted):
    """As it does while the controller has too many jobs; it may have sent the job all the same."""
    said = tmp_path / "said"

    class Heard(subprocess.Popen):
        """Its seconds count from when it has spoken, however late it gets a processor."""

        def communicate(self, *given, **how):
            while not said.exists():
                time.sleep(0.01)
            return super().communicate(*given, **how)

    monkeypatch.setattr(subprocess, "Popen", Heard)
    says = "echo sbatch: temporarily unable to accept job >&2"
    command_of_slurm(tmp_path, monkeypatch, "sbatch", f"{says}; touch {said}; exec sleep 60")
    monkeypatch.setattr(slurm, "elements", lambda names: [element("PENDING", number="7_0")] if accepted else [])
    monkeypatch.setattr(slurm, "time", SimpleNamespace(sleep=lambda seconds: None))
    if accepted:
        assert slurm.submit([], "mb-1", set(), 0.5) == "7"
        return
    with pytest.raises(slurm.Unavailable, match=r"did not answer within 0 s: .*temporarily unable") as caught:
        slurm.submit([], "mb-1", set(), 0.5)
    assert any(word in str(caught.value) for word in submit.FULL)  # so it is held back


# Task ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_task(monkeypatch):
    for name, value in {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "SLURM_RESTART_COUNT": "3"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("bench.element.signal.signal", lambda number, handler: None)


@pytest.mark.parametrize(("most", "asked"), [(3, []), (4, ["7_0"])])
def test_a_task_puts_itself_back_only_so_often(tmp_path, monkeypatch, in_task, most, asked):
    from bench.element import Element

    found: list[str] = []
    monkeypatch.setattr(slurm, "requeue", found.append)
    Element(a_submission(tmp_path, requeues=most)).put_back()
    assert found == asked


def test_a_requeue_that_slurm_refuses_is_no_failure(tmp_path, monkeypatch, capsys):
    command_of_slurm(tmp_path, monkeypatch, "scontrol", "echo Job is already being requeued >&2; exit 1")
    slurm.requeue("7_0")
    assert "requeue of 7_0: scontrol: Job is already being requeued" in capsys.readouterr().out


def test_a_task_refuses_code_that_is_not_what_was_submitted(submission, in_task, capsys, monkeypatch):
    from bench import element

    monkeypatch.setattr(element, "ROOT", submission.snapshot)
    monkeypatch.setattr(element.Element, "run", lambda self: 0)
    assert element.main([str(submission.folder)]) == 0
    with open(submission.snapshot / "bench" / "run.py", "a") as file:
        file.write("\n")
    assert element.main([str(submission.folder)]) == 2
    said = f"is not the code that was submitted ({submission.code})"
    assert said in capsys.readouterr().err and said in (submission.folder / submit.REFUSED).read_text()


def test_each_requirement_names_tests_that_are_there():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    items = (ROOT / "slurm" / "README.md").read_text().split("\n1. ", 1)[1].splitlines()
    assert len(items) == 31
    for name in re.findall(r"`([a-z]\w*_\w*)`", "\n".join(items)):
        assert re.search(rf"def \w*{name}", tests), name


# Who is gone --------------------------------------------------------------------------------------------------------


def element(state: str, restarts: int = 0, name: str = "mb-1", number: str = "7_0") -> slurm.Element:
    return slurm.Element(number, name, state, "None", restarts, "n1", "1:00")


def owner(restarts: int = 0) -> dict:
    return {"node": "n1", "pid": 1, "job": {"name": "mb-1", "id": "7_0", "restarts": restarts}}


@pytest.mark.parametrize(
    ("seen", "gone"),
    [
        ([element("RUNNING")], False),
        ([element("COMPLETING")], False),
        ([element("FAILED")], True),
        ([element("CANCELLED")], True),
        ([element("RUNNING", restarts=1)], True),  # another life of the same task
        ([element("PENDING", restarts=1)], True),
        ([], True),  # cancelled while it waited, or forgotten
        ([element("RUNNING")._replace(node="n2")], True),  # started anew by a controller that lost its state
        ([element("RUNNING", name="mb-2")], True),  # the number is another job's by now
    ],
)
def test_an_owner_is_gone_when_slurm_has_shown_it_twice(monkeypatch, seen, gone):
    now, asked = [100.0], []
    watch = slurm.Watch(lambda: now[0])
    monkeypatch.setattr(slurm, "elements", lambda names: asked.append(names) or seen)
    assert watch.gone([owner()]) == []
    now[0] += slurm.CONFIRM_SECONDS / 2
    assert watch.gone([owner()]) == [] and len(asked) == 1  # too early to ask again
    now[0] += slurm.CONFIRM_SECONDS
    assert watch.gone([owner()]) == ([owner()] if gone else []) and len(asked) == 2


def test_silence_and_a_single_absence_are_no_death(monkeypatch):
    now, answers = [100.0], [[], slurm.Unavailable("squeue: timed out"), [element("RUNNING")], [], [element("RUNNING")]]
    watch = slurm.Watch(lambda: now[0])

    def elements(names):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(slurm, "elements", elements)
    while answers:
        assert watch.gone([owner(), {"node": "n2", "pid": 2}]) == []
        now[0] += slurm.CONFIRM_SECONDS + 1


@pytest.mark.parametrize(
    ("signal", "answer", "kind"),
    [
        ("SIGTERM", "COMPLETING|1|5:00|", "preempted"),
        ("SIGTERM", "COMPLETING|0|5:00|", "cancelled"),
        ("SIGTERM", "RUNNING|0|0:03|", "timeout"),
        ("SIGUSR2", "RUNNING|0|1:10|", "timeout"),
        ("SIGUSR2", "RUNNING|0|9:00|", "preempted"),  # a short job is not a timed-out one
        ("SIGTERM", "", "preempted"),
    ],
)
def test_why_a_task_was_stopped(monkeypatch, signal, answer, kind):
    monkeypatch.setattr(slurm, "ask", lambda words, seconds: answer + "\n")
    assert slurm.why_stopped(signal, "7_0", 0, 60)[0] == kind


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("FAILED||600M\nFAILED|400000K|\n", "FAILED"),
        ("FAILED||600M\nFAILED|598000K|\n", "OUT_OF_MEMORY, using 598000K of 600M"),
        ("CANCELLED by 0||4Gn\n", "CANCELLED"),
        ("", ""),
    ],
)
def test_memory_decides_where_slurm_only_says_failed(text, state):
    assert slurm.accounted(text) == state


@pytest.mark.parametrize(
    ("state", "wrote", "kind"),
    [
        ("OUT_OF_MEMORY", "", "oom"),
        ("FAILED", "slurmstepd: error: Detected 1 oom_kill event in StepId=7.batch.", "oom"),
        ("FAILED", "slurmstepd-n1: error: StepId=7.batch exceeded memory limit (9 > 8), being killed", "oom"),
        ("TIMEOUT", "", "timeout"),
        ("", "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-24T11:49:47 DUE TO TIME LIMIT ***", "timeout"),
        ("NODE_FAIL", "", "preempted"),
        ("", "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-24T11:49:47 DUE TO PREEMPTION ***", "preempted"),
        ("CANCELLED", "", "cancelled"),
        ("", "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-24T11:49:47 ***", "cancelled"),
        ("FAILED", "", "lost"),
        ("", "", "lost"),
        ("", "ValueError: oom_kill", "lost"),  # a run's own words are not Slurm's
        ("", "7_0 on n1, restart 1, 2 CPUs\nslurmstepd: error: oom_kill", "lost"),  # of the task's next life
    ],
)
def test_who_ended_without_a_word_is_spoken_for_by_slurm(tmp_path, monkeypatch, state, wrote, kind):
    """By its state, and where that is forgotten or says nothing by what its daemon wrote below the task's output."""
    (tmp_path / "slurm-7_0.txt").write_text(f"7_0 on n1, restart 0, 2 CPUs\nstep 1\n{wrote}\n")
    monkeypatch.setattr(slurm, "elements", lambda names: [element(state)] if state else [])
    monkeypatch.setattr(slurm, "ask", lambda words, seconds: "")
    found, said = slurm.last_words(owner() | {"log": str(tmp_path / "log-7_0-0-0.txt")})
    assert found == kind and "7_0 on n1 ended without a word" in said and "\n" not in said


def test_a_job_that_sbatch_lost_sight_of_is_found_by_its_name(monkeypatch):
    def late(words, seconds):
        raise slurm.Unavailable("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")

    answers = [[], [element("PENDING", number="7_0"), element("PENDING", number="6_0")]]
    monkeypatch.setattr(slurm, "ask", late)
    monkeypatch.setattr(slurm, "elements", lambda names: answers.pop(0))
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)
    assert slurm.submit([], "mb-1", {"6"}) == "7"
    monkeypatch.setattr(slurm, "elements", lambda names: [element("PENDING", number="6_0")])
    with pytest.raises(slurm.Unavailable):
        slurm.submit([], "mb-1", {"6"})


# Leases -------------------------------------------------------------------------------------------------------------


def test_a_lease_tells_the_task_and_its_log_and_who_was_before(tmp_path, monkeypatch):
    names = {
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "0",
        "SLURM_JOB_NAME": "mb-1",
        "SLURM_RESTART_COUNT": "2",
    }
    for name, value in {**names, "SLURMD_NODENAME": "n9", "MIXERBENCH_LOG": "/l"}.items():
        monkeypatch.setenv(name, value)
    results = Store(tmp_path)
    assert results.take(RUN).bereft is None
    held = results.owner(RUN)
    assert (held["node"], held["log"]) == ("n9", "/l") and held["job"] == {"name": "mb-1", "id": "7_0", "restarts": 2}
    monkeypatch.setenv("SLURMD_NODENAME", "n8")  # from elsewhere its process cannot be looked up
    assert results.take(RUN) is None and results.take(RUN, {**held, "pid": -1}) is None
    second = results.take(RUN, held)
    assert second.bereft == held and second.held()
    second.release()
    assert results.take(RUN).bereft is None


def test_a_process_that_is_lost_counts_only_where_the_run_got_no_further(tmp_path):
    results = Store(tmp_path)
    results.open(RUN)
    for step in range(1, 30):
        (results.folder(RUN) / "progress.json").write_text(f'{{"step": {step}, "steps": 100}}')
        results.fail(RUN, "lost", "message")
    assert not results.given_up(RUN, 0)
    results.fail(RUN, "lost", "message")
    assert results.given_up(RUN, 0) and not results.given_up(RUN, 1)


def test_interruptions_without_progress_end_too(tmp_path):
    results = Store(tmp_path)
    for _ in range(20):
        results.fail(RUN, "preempted", "message")
    assert not results.given_up(RUN, 2)
    results.fail(RUN, "timeout", "message")
    assert results.given_up(RUN, 2)


def test_only_one_submits_a_sweep_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(submit, "OTHER_SUBMITTER_SECONDS", 0.0)
    mine = take(tmp_path)
    assert "somebody else" in refusal(submit.alone, tmp_path)
    mine.release()
    submit.alone(tmp_path).release()


def test_a_slurm_that_does_not_answer_leaves_no_submission(tmp_path, monkeypatch):
    def silent():
        raise slurm.Unavailable("scontrol is not installed here")

    monkeypatch.setattr(slurm, "max_array_size", silent)
    monkeypatch.setattr(slurm, "elements", lambda names: [])
    monkeypatch.setattr(submit, "check", lambda cluster, where: None)
    where = make_where({"where.results": str(tmp_path / "results")})
    path = ROOT / "sweeps" / "quickstart.yaml"
    assert "scontrol" in refusal(submit.submit, path, submit.RUNS, 3, ["a"], [], where, cluster(), None)
    assert not list((tmp_path / "results").rglob("submission.json"))
    assert not (tmp_path / "results" / "slurm" / "snapshots").exists()


@pytest.mark.parametrize("name", ["..", "a\ntouch HIT", "a b", ""])
def test_a_sweeps_file_name_is_a_folders_name(tmp_path, name):
    where = make_where({"where.results": str(tmp_path)})
    assert "rename" in refusal(
        submit.submit, tmp_path / f"{name}.yaml", submit.RUNS, 1, [RUN], [], where, cluster(), None
    )
    assert list(tmp_path.iterdir()) == []

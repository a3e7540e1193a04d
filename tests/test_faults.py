"""What may go wrong on a cluster, done to a virtual one: nothing lost, nothing doubled, every run as if undisturbed.

The runs are slowed down by a sleep in the mixer, so that there is a middle in which to disturb them; what they compute
is the same, and each is compared to the last bit with a run of the code as it is, undisturbed, in one process.
"""

import contextlib
import json
import os
import re
import signal
import stat
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from bench.record import Record
from tests.test_slurm import Case, case, checkout, same_science, waiting
from tests.virtual import Virtual, slurm, wait

pytestmark = pytest.mark.slurm
STEPS = 200
ONE = {"mixers": [{"name": "identity", "heads": 2}], "seeds": [0], "varies": {"budget.steps": [STEPS]}}
SLOW = "        time.sleep(0.06)\n        "
SLEEPY = {"bench/mixers/identity.py": ("        return v_BLHP", f"{SLOW}return v_BLHP")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Record:
    """The record of the one run, made on this machine by the code as it is."""
    plain = case(tmp_path_factory.mktemp("plain"), {}, **ONE)
    plain.here()
    return plain.records()[0]


@pytest.fixture(scope="module")
def slow(tmp_path_factory) -> Path:
    root = checkout(tmp_path_factory.mktemp("slow") / "checkout", SLEEPY)
    path = root / "bench" / "mixers" / "identity.py"
    text = path.read_text()
    path.write_text(text.replace("\nimport torch\n", "\nimport time\n\nimport torch\n", 1))
    return root


@pytest.fixture
def one(virtual, tmp_path, slow) -> Case:
    """The one run, submitted and in its middle."""
    asked = case(tmp_path, {}, **ONE)
    begun(asked, slow)
    return asked


def begun(asked: Case, slow: Path) -> None:
    asked.submit("where.checkpoint_seconds=1", root=slow)
    in_the_middle(asked)


def in_the_middle(asked: Case) -> str:
    """Wait until the run is between 10 and 60 percent; the array element that has it."""
    (run,) = asked.runs
    wait(lambda: asked.store.progress(run.id) > 0.1, 180, asked.logs)
    assert asked.store.progress(run.id) < 0.6 and not asked.store.has(run.id)
    return owner_of(asked)["job"]["id"]


def owner_of(asked: Case) -> dict:
    """Whoever holds the newest lease, as its file says."""
    (run,) = asked.runs
    paths = asked.store.folder(run.id).glob("lease-*.json")
    return json.loads(max(paths, key=lambda path: int(path.stem.split("-")[1])).read_text())


def kinds(asked: Case) -> list[str]:
    (run,) = asked.runs
    return [failure["kind"] for failure in asked.store.failures(run.id)]


def ends_well(asked: Case, undisturbed: Record) -> Record:
    """One record, equal to the undisturbed one, and nobody left."""
    asked.finished()
    (record,) = asked.records()
    assert same_science(record, undisturbed), asked.logs()
    (run,) = asked.runs
    left = {p.name.split("-")[0] for p in asked.store.folder(run.id).iterdir()}
    assert left <= {"record.json", "items.parquet", "weights.pt", "failure", "lease"}
    screen = asked.verb("status", "--all")
    assert screen.splitlines()[0].endswith("1 runs: 1 ok")
    for failure in asked.store.failures(run.id)[-1:]:
        assert f"{failure['kind']}: {failure['message'].splitlines()[0]}"[:60] in screen
    return record


def test_the_time_limit_twice(virtual, tmp_path, slow, undisturbed):
    """One minute, of which Slurm may take up to a minute for its warning; the run needs more than one such stretch."""
    asked = case(tmp_path, {"time": 1, "warn": 30, "requeues": 30}, **ONE)  # a busy machine needs many stretches
    text = (slow / "bench" / "mixers" / "identity.py").read_text()
    slower = checkout(tmp_path / "slower", {})
    (slower / "bench" / "mixers" / "identity.py").write_text(text.replace("0.06", "0.3"))
    asked.submit(root=slower)
    asked.finished(900)
    ends_well(asked, undisturbed)
    assert kinds(asked)[:2] == ["timeout", "timeout"] and set(kinds(asked)) == {"timeout"}


def test_a_worker_that_is_killed_is_spoken_for_and_replaced(one, undisturbed):
    os.kill(owner_of(one)["pid"], signal.SIGKILL)
    ends_well(one, undisturbed)
    assert kinds(one) == ["lost"]
    (failure,) = one.store.failures(one.runs[0].id)
    assert "killed by SIGKILL" in failure["message"] and failure["progress"] > 0 and Path(failure["log"]).exists()


def test_slurms_daemon_on_a_node_may_restart(virtual, one, undisturbed):
    node = owner_of(one)["node"]
    virtual("orphan", node)
    virtual("boot", node)
    ends_well(one, undisturbed)
    assert kinds(one) == []


@pytest.mark.parametrize("knows", ["that it runs", "that it waits", "nothing of it"])
def test_slurms_controller_may_restart(virtual, tmp_path, slow, undisturbed, knows):
    """With what it had saved of the task, which it does every five seconds."""
    asked, state = case(tmp_path, {}, **ONE), Path(virtual.conf).parent / "state" / "job_state"
    with waiting():
        asked.submit("where.checkpoint_seconds=1", root=slow)
        save(state, asked.queue()[0].split()[0])
        waits = state.read_bytes()
    in_the_middle(asked)
    pid = owner_of(asked)["pid"]
    if knows == "that it runs":
        save(state, owner_of(asked)["job"]["id"])
    virtual("halt")
    if knows == "that it waits":
        state.write_bytes(waits)
    if knows == "nothing of it":
        for path in state.parent.glob("job_state*"):
            path.unlink()
    virtual("resume")
    if knows == "nothing of it":
        wait(lambda: not Path(f"/proc/{pid}").exists(), 120, asked.logs)
        asked.submit(root=slow)
    ends_well(asked, undisturbed)
    assert kinds(asked) == ([] if knows == "that it runs" else ["lost"])


def save(state: Path, task: str) -> None:
    """Have the controller save its jobs."""
    state.unlink(missing_ok=True)
    slurm("scontrol", "update", f"JobId={task}", "Comment=save")
    wait(state.exists, 60)


def test_an_administrators_requeue(one, undisturbed):
    slurm("scontrol", "requeue", owner_of(one)["job"]["id"])
    ends_well(one, undisturbed)
    assert kinds(one) == ["preempted"]


def test_a_job_that_is_preempted(one, undisturbed, tmp_path):
    node = owner_of(one)["node"]
    words = ["-p", "high", "-w", node, "-t", "1", "-o", "/dev/null", "--wrap", "sleep 5"]
    job = slurm("sbatch", "--parsable", *words).strip()
    ends_well(one, undisturbed)
    assert kinds(one) == ["preempted"]
    slurm("scancel", job)


def test_a_cancelled_sweep_goes_on_when_it_is_submitted_again(one, undisturbed, slow):
    slurm("scancel", owner_of(one)["job"]["id"])
    one.ended(60)
    assert kinds(one) == ["cancelled"]
    progress = one.store.progress(one.runs[0].id)
    one.submit(root=slow)
    ends_well(one, undisturbed)
    assert progress > 0.1 and kinds(one) == ["cancelled"]


def test_two_live_copies_of_one_task(virtual, one, undisturbed):
    """slurmd dies, its task does not: Slurm starts the task again elsewhere. The record is written once."""
    owner = owner_of(one)
    os.kill(owner["pid"], signal.SIGSTOP)  # so that it is still there when the other one has begun
    virtual("orphan", owner["node"])
    try:
        wait(lambda: owner_of(one)["node"] != owner["node"], 240)
        os.kill(owner["pid"], signal.SIGCONT)
        ends_well(one, undisturbed)
    finally:
        virtual("boot", owner["node"])
    wait(lambda: not Path(f"/proc/{owner['pid']}").exists(), 60)
    ends_well(one, undisturbed)


def test_a_lease_of_a_node_that_is_no_more(virtual, tmp_path, slow, undisturbed):
    """Its job is gone, though the one that comes for the run has its number: Slurm has begun to count anew."""
    asked = case(tmp_path, {}, **ONE)
    (run,) = asked.runs
    lease = asked.store.take(run.id)
    with waiting():
        number = asked.submit().arrays[0]["job"]
        stale = {"node": "n9", "machine": "x", "pid": 1, "started": "1"}
        stale["job"] = {"name": "mb-00000000", "id": f"{number}_0", "restarts": 0}
        lease.path.write_text(json.dumps(stale))
    ends_well(asked, undisturbed)
    assert kinds(asked) == ["lost"] and f"{number}_0 on n9" in asked.store.failures(run.id)[0]["message"]


def test_a_death_while_the_record_is_written(virtual, tmp_path, undisturbed):
    die = 'if path.name == "record.json" and not Path("/dev/shm/died").exists():\n            '.replace(
        "/dev/shm/died", str(tmp_path / "died")
    )
    die += f'Path("{tmp_path}/died").touch()\n            os.kill(os.getpid(), 9)\n        os.link(temporary, path)'
    root = checkout(tmp_path / "checkout", {"bench/whole.py": ("os.link(temporary, path)", die)})
    asked = case(tmp_path, {}, **ONE)
    asked.submit(root=root)
    asked.finished()
    assert (tmp_path / "died").exists() and same_science(asked.records()[0], undisturbed)
    assert kinds(asked) == ["lost"]


@pytest.fixture
def small_disk(tmp_path):
    """A results folder on a disk of its own."""
    results = tmp_path / "results"
    results.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", results]).returncode:
        pytest.skip("may not mount")
    yield results
    subprocess.run(["umount", "--lazy", results], check=True)  # Slurm may still write the end of a log


@contextlib.contextmanager
def between_writes(asked: Case) -> Iterator[None]:
    """The owner stands still, nothing of it half-written: a file it gives up later would make room again."""
    (run,) = asked.runs
    owner, folder = owner_of(asked)["pid"], asked.store.folder(run.id)

    def still() -> bool:
        os.kill(owner, signal.SIGSTOP)
        wait(lambda: Path(f"/proc/{owner}/stat").read_text().rpartition(")")[2].split()[0] == "T", 60)
        if any(folder.glob(".*.*")):
            os.kill(owner, signal.SIGCONT)
            return False
        return True

    wait(still, 60)
    try:
        yield
    finally:
        os.kill(owner, signal.SIGCONT)


def fill(folder: Path) -> Path:
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"0" * 4096)
    return filler


@pytest.mark.parametrize("running", [False, True], ids=["before_it_begins", "in_its_middle"])
def test_a_full_disk(virtual, tmp_path, slow, small_disk, undisturbed, running):
    """The reason fits into room that was kept for it; when there is room again, the same command goes on."""
    asked = case(tmp_path, {}, **ONE)
    if running:
        begun(asked, slow)
        with between_writes(asked):
            filler = fill(small_disk)
    else:
        with waiting():
            asked.submit("where.checkpoint_seconds=1", root=slow)
            filler = fill(small_disk)
    asked.ended(120)
    assert asked.records() == [None] and kinds(asked) == (["error"] if running else [])
    assert states(asked) == {"FAILED"}
    screen, full = asked.verb("status"), "No space left on device"
    assert f"error: {full} in the results folder" in screen if running else "1 runs: 0 ok, 1 missing" in screen
    assert "the last ones refused: mixerbench: results folder" in screen and f"cannot be written: {full}" in screen
    assert not running or f"{full} in the results folder" in asked.verb("logs", asked.runs[0].id)
    refused = asked("--on", str(asked.cluster), code=2, root=slow)
    assert full in refused.splitlines()[-1]
    filler.unlink()
    asked.submit(root=slow)
    ends_well(asked, undisturbed)
    assert kinds(asked) == (["error"] if running else [])


def test_a_run_that_raises_one_too_large_and_one_that_diverges(virtual, tmp_path):
    """Each ends with its reason, none is tried for ever, and their neighbour is not harmed.

    The large one gets no memory from the system: `ulimit` stands for a machine that has no more.
    """
    line = "real_BL11 = real(segments_BL, v_BLHP.dtype)"
    edits = {
        "bench/mixers/identity.py": (
            "        return v_BLHP * real",
            '        raise ValueError("\\x1b[31mbad luck")\n        return v_BLHP * real',
        ),
        "bench/mixers/toeplitz.py": (line, f"large = torch.ones(4 * 10**9)\n        {line}"),
    }
    mixers = [{"name": name, "heads": 2} for name in ("identity", "dense")]
    mixers.append({"name": "toeplitz", "heads": 2, "sam": False})
    asked = case(tmp_path, {"setup": ["ulimit -v 8000000"]}, mixers=mixers, seeds=[0], varies={"budget.steps": [4]})
    root = checkout(tmp_path / "checkout", edits)
    asked.submit("where.retries=1", root=root)
    asked.ended(240)
    store, (raises, fine, large) = asked.store, asked.runs
    assert store.record(fine.id).outcome == "ok" and not store.has(raises.id) and not store.has(large.id)
    assert [f["kind"] for f in store.failures(raises.id)] == ["error"] * 2
    assert [f["kind"] for f in store.failures(large.id)] == ["oom"] * 2
    assert states(asked) == {"FAILED"}
    screen = asked.verb("status")
    assert "3 runs: 1 ok, 2 given up (error 1, oom 1)" in screen and "ValueError: bad luck" in screen
    assert "oom: RuntimeError: DefaultCPUAllocator: can't allocate memory" in screen
    assert "nothing to submit" in asked("--on", str(asked.cluster), "where.retries=1", root=root)
    wild = case(tmp_path, {}, **{**ONE, "varies": {"budget.steps": [20], "optimiser.lr": [1e30]}})
    wild.submit()
    wild.finished()
    assert wild.records()[0].outcome == "diverged" and "not finite" in wild.records()[0].reason
    screen = wild.verb("status")
    assert "1 diverged" in screen.splitlines()[0] and "not finite" in screen


def test_a_worker_that_the_kernel_kills_for_its_memory(tmp_path, undisturbed):
    """Only the worker: its task tells how much it had used of what it had asked for, and goes on with the next one."""
    group = Path("/sys/fs/cgroup/memory") / f"mixerbench-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text("1000M")
    except OSError:
        pytest.skip("no control group of memory may be made here; Slurm's own kill has a test, too")
    setup = [f"echo $$ > {group}/cgroup.procs"]
    grab = f"        if not __import__('os').path.exists('{tmp_path}/died'):\n"
    grab += f"            open('{tmp_path}/died', 'w').close()\n            large = b'x' * 3 * 10**9\n"
    line = "        return v_BLHP"
    root = checkout(tmp_path / "checkout", {"bench/mixers/identity.py": (line, grab + line)})
    try:
        with Virtual(accounting=False, lines="JobAcctGatherType=jobacct_gather/none"):  # only the kernel kills
            asked = case(tmp_path, {"memory": "1000M", "setup": setup}, **ONE)
            asked.submit(root=root)
            ends_well(asked, undisturbed)
            (failure,) = asked.store.failures(asked.runs[0].id)
            assert failure["kind"] == "oom" and "killed by SIGKILL" in failure["message"]
            assert re.search(r"using \d+ MB of 1049", failure["message"])
    finally:
        wait(lambda: not (group / "cgroup.procs").read_text(), 60)
        group.rmdir()


def states(asked: Case) -> set[str]:
    """Slurm's, of all tasks."""
    return set(slurm("squeue", "-h", "-r", "-t", "all", "-o", "%T", f"--name={names(asked)}").split())


def names(asked: Case) -> str:
    from bench.submit import submissions

    return ",".join(s.name for s in submissions(asked.store.root, asked.sweep.stem))


def test_sbatch_gives_up_though_the_job_was_accepted(virtual, tmp_path, undisturbed, monkeypatch):
    real = slurm("which", "sbatch").strip()
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\n{real} "$@" >/dev/null\necho "Socket timed out on send/recv" >&2\nexit 1\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    asked = case(tmp_path, {}, **ONE)
    with waiting():
        assert len(asked.submit().arrays) == 1 and len(asked.queue()) == 1
    ends_well(asked, undisturbed)
    assert kinds(asked) == []


# Nobody is left to speak ----------------------------------------------------------------------------------------------


def vanishes(virtual: Virtual, asked: Case, slow: Path, undisturbed: Record) -> None:
    """All of it is killed at once. With accounting squeue has forgotten it when somebody asks, and sacct has not."""
    begun(asked, slow)
    element, worker = owner_of(asked)["job"]["id"], owner_of(asked)["pid"]
    for process in (parent_of(worker), worker):
        os.kill(process, signal.SIGKILL)
    asked.ended(120)
    if virtual.accounting:
        wait(lambda: not slurm("squeue", "-h", "-t", "all", f"--name={names(asked)}"), 240, "squeue remembers")
    assert f"lost: {element} on {owner_of(asked)['node']} ended without a word: FAILED" in asked.verb("status")
    asked.submit(root=slow)
    ends_well(asked, undisturbed)
    assert kinds(asked) == ["lost"]


def is_deaf_to_its_time_limit(virtual: Virtual, asked: Case, slow: Path, undisturbed: Record) -> None:
    """The worker hangs, and neither it nor its task hears what Slurm sends, until Slurm kills them."""
    hung, handler = asked.folder / "hung", "    def _handle(self, number, frame) -> None:\n"
    edits = {f"bench/{name}.py": (handler, f"{handler}        return\n") for name in ("element", "worker")}
    deaf = checkout(asked.folder / "deaf", edits)
    text = (slow / "bench" / "mixers" / "identity.py").read_text()
    hangs = f"{SLOW}while __import__('os').path.exists('{hung}'):\n            time.sleep(0.1)\n        "
    (deaf / "bench" / "mixers" / "identity.py").write_text(text.replace(SLOW, hangs))
    begun(asked, deaf)
    hung.touch()
    owner = owner_of(asked)
    slurm("scontrol", "update", f"JobId={owner['job']['id']}", "TimeLimit=1")
    asked.ended(300)
    hung.unlink()
    screen = asked.verb("status")
    assert "1 failed (timeout 1)" in screen and "ended without a word: TIMEOUT" in screen
    asked.submit(root=deaf)
    ends_well(asked, undisturbed)
    assert kinds(asked) == ["timeout"]


def waits_again_and_is_cancelled(virtual: Virtual, asked: Case, slow: Path, undisturbed: Record) -> None:
    """Put back, which leaves the worker no time, and cancelled then: of a waiting element that leaves no trace."""
    begun(asked, slow)
    owner = owner_of(asked)
    os.kill(owner["pid"], signal.SIGSTOP)
    slurm("scontrol", "requeuehold", owner["job"]["id"])
    wait(lambda: asked.queue() and "PENDING" in asked.queue()[0], 120)
    slurm("scancel", owner["job"]["id"])
    asked.ended(120)
    asked.submit(root=slow)
    ends_well(asked, undisturbed)
    assert len(kinds(asked)) == 1 and set(kinds(asked)) <= {"cancelled", "preempted", "lost"}


def is_on_a_node_without_power(virtual: Virtual, asked: Case, slow: Path, undisturbed: Record) -> None:
    begun(asked, slow)
    first = owner_of(asked)["node"]
    virtual("cut", first)
    try:
        record = ends_well(asked, undisturbed)
    finally:
        virtual("boot", first)
    assert record.environment.node != first and kinds(asked) == ["preempted"]
    assert "put back into the queue" in asked.store.failures(asked.runs[0].id)[0]["message"]


def is_killed_for_its_memory(virtual: Virtual, asked: Case, slow: Path, undisturbed: Record) -> None:
    """By Slurm, all of it at once. With accounting the memory that it used tells so (MaxRSS against the request, as
    the state is FAILED), without it what Slurm's daemon wrote below its output."""
    grab = "        self.grabbed = [b'x' * 10**9, __import__('time').sleep(20)]\n"
    line = "        return v_BLHP"
    large = checkout(asked.folder / "large", {"bench/mixers/identity.py": (line, grab + line)})
    values = yaml.safe_load(asked.cluster.read_text())
    asked.cluster.write_text(yaml.safe_dump(values | {"memory": "1200M"}))
    asked.submit(root=large)
    wait(asked.queue, 60)
    asked.ended(240)
    (run,) = asked.runs
    assert kinds(asked) == [] and not asked.store.has(run.id)
    how = "OUT_OF_MEMORY, using " if virtual.accounting else "exceeded memory limit ("
    screen = wait(lambda: how in (text := asked.verb("status")) and text, 60, "no reason")
    assert "1 failed (oom 1)" in screen
    asked.submit(root=slow)
    ends_well(asked, undisturbed)
    assert kinds(asked) == ["oom"] and how in asked.store.failures(run.id)[0]["message"]


SPEECHLESS = (
    is_deaf_to_its_time_limit,
    is_on_a_node_without_power,
    vanishes,
    waits_again_and_is_cancelled,
    is_killed_for_its_memory,
)


@pytest.mark.parametrize("virtual", [False, True], indirect=True, ids=["without_accounting", "with_accounting"])
def test_tasks_that_nobody_can_speak_for(virtual, tmp_path, slow, undisturbed):
    """All at a time, since most of it is waiting, once where sacct can be asked and once where it cannot."""
    with ThreadPoolExecutor(len(SPEECHLESS)) as pool:
        ends = []
        for fault in SPEECHLESS:
            (tmp_path / fault.__name__).mkdir()
            ends.append(pool.submit(fault, virtual, case(tmp_path / fault.__name__, {}, **ONE), slow, undisturbed))
    if failed := [error for end in ends if (error := end.exception())]:
        raise ExceptionGroup("a task that nobody can speak for", failed)


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])

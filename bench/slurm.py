"""Asks and tells Slurm: one call for a whole sweep, with a time limit; squeue first, sacct last and optional.

Slurm's silence is not a state: `Unavailable` means that nobody answered, and never that a job failed.
"""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench import Refusal

SECONDS = 30.0  # for an answer; slurmctld's own limit is 10
ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
)
FULL_MEMORY = 0.95  # of what was asked for: who was killed there was killed for it
# Kind of failure -> what Slurm calls it, as a state or in its lines under a task's output.
LAST_WORDS = {
    "oom": ("OUT_OF_MEMORY", "oom_kill", "oom-kill", "memory limit", "Out Of Memory"),
    "timeout": ("TIMEOUT", "DEADLINE", "DUE TO TIME LIMIT"),
    "preempted": (
        *("put back", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL"),
        *("DUE TO PREEMPTION", "DUE TO NODE", "DUE TO JOB REQUEUE"),
    ),
    "cancelled": ("CANCELLED",),  # the last: Slurm calls each of the others that, too
}
CONFIRM_SECONDS = 10.0  # between two looks before a job is taken for gone


class Unavailable(Exception):
    """Slurm did not answer, or refused; one line."""


class Element(NamedTuple):
    """An array element as squeue shows it."""

    id: str  # '123_4'
    name: str
    state: str
    reason: str  # Slurm's own, why it waits; 'None' if it does not
    restarts: int
    node: str  # that its batch script runs on
    left: str  # time left, as Slurm writes it


def this_element() -> tuple[str, int]:
    """The array element that this process is in, as '123_4', and how often it was put back into the queue."""
    try:
        element = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    except KeyError:
        raise Refusal("this is started by Slurm, as an element of a job array") from None
    return element, int(os.environ.get("SLURM_RESTART_COUNT", 0))


def environment() -> dict[str, str]:
    """Ours without what another job or the user's habits would smuggle into a submission or a question."""
    smuggled = (
        "SLURM_",
        "SBATCH_",
        "SALLOC_",
        "SRUN_",
        "SQUEUE_",
        "SACCT_",
        "SCANCEL_",
        "MIXERBENCH_LOG",
        "MIXERBENCH_SUBMISSION",
    )
    return {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or not k.startswith(smuggled)}


def ask(words: list[str], seconds: float = SECONDS) -> str:
    """What a Slurm command prints. Raises Unavailable."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, env=environment())
    except FileNotFoundError:
        raise Unavailable(f"{words[0]} is not installed here") from None
    except subprocess.TimeoutExpired as late:
        said = " ".join((late.stderr or b"").decode(errors="replace").split())
        raise Unavailable(f"{words[0]} did not answer within {seconds:.0f} s" + (f": {said}" if said else "")) from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise Unavailable(f"{words[0]}: {' '.join(lines[-1].split())}")
    return done.stdout


def elements(names: list[str]) -> list[Element]:
    """Every element of the jobs of these names that Slurm still knows, ended ones included. Raises Unavailable."""
    columns = ("JobArrayID", "Name", "State", "Reason", "RestartCnt", "BatchHost", "TimeLeft")
    form = ",".join(f"{column}:|" for column in columns)
    found = []
    for start in range(0, len(names), 200):
        some = ",".join(names[start : start + 200])
        for line in ask(["squeue", "-h", "-r", "-t", "all", "--name", some, "-O", form]).splitlines():
            parts = line.split("|")
            if len(parts) > len(columns):
                found.append(Element(*parts[:4], int(parts[4]), *parts[5:7]))
    return found


def alive(element: Element) -> bool:
    """Whether it runs or may run again."""
    return element.state not in ENDED


def max_array_size() -> int:
    """The most elements of one array here."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask(["scontrol", "show", "config"]), re.MULTILINE)
    return int(found[1]) if found else 1001


def partition_limits(name: str) -> tuple[float, float]:
    """A partition's time limit in minutes and the most nodes of a job. Raises Unavailable if it does not exist."""
    said = ask(["scontrol", "show", "partition", name])
    time = re.search(r"\bMaxTime=(\S+)", said)
    nodes = [int(number) for number in re.findall(r"\b(?:MaxNodes|TotalNodes)=(\d+)", said)]
    return minutes(time[1]) if time else float("inf"), min(nodes, default=float("inf"))


def minutes(text: str) -> float:
    """Slurm's [days-]hours:minutes:seconds or minutes:seconds."""
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text):
        return float("inf")  # UNLIMITED, INVALID, NOT_SET
    days, _, rest = text.rpartition("-")
    parts = [int(p) for p in rest.split(":")]
    while len(parts) < 3:
        parts = [*parts, 0] if days else [0, *parts]
    return int(days or 0) * 1440 + parts[0] * 60 + parts[1] + parts[2] / 60


def submit(words: list[str], name: str, known: set[str], seconds: float = SECONDS) -> str:
    """sbatch with these words: the job's number. `known`: numbers of earlier jobs of this name.

    sbatch may give up waiting for a controller that accepted the job all the same, so whatever it says, a job of our
    own name that was not known before is the one. Raises Unavailable if there is none.
    """
    try:
        return ask(["sbatch", "--parsable", *words], seconds).strip().split(";")[0].splitlines()[-1]
    except Unavailable as error:
        if not re.search(r"did not answer|[Tt]imed out|[Cc]onnection|contact|[Cc]ommunication", str(error)):
            raise
        for wait in (0.0, 2.0, 5.0, 10.0):
            time.sleep(wait)
            try:
                fresh = {e.id.split("_")[0] for e in elements([name])} - known
            except Unavailable:
                continue
            if fresh:
                return fresh.pop()
        raise


def why_stopped(signal_name: str, element: str, restarts: int, warn: float) -> tuple[str, str]:
    """(kind of failure, message) for a task that got USR2 or TERM, by what Slurm says about it now."""
    try:
        words = ["squeue", "-h", "-r", "-t", "all", "-j", element, "-O", "State:|,RestartCnt:|,TimeLeft:|"]
        state, count, left = ask(words, 5.0).splitlines()[0].split("|")[:3]
    except (Unavailable, IndexError, ValueError):
        return "preempted", f"{signal_name} at {element}; Slurm did not say why"
    if int(count) > restarts or state in ("PENDING", "REQUEUED", "REQUEUE_HOLD", "PREEMPTED", "NODE_FAIL"):
        return "preempted", f"{element} was put back into the queue"
    if minutes(left) * 60 <= (warn + 90 if signal_name == "SIGUSR2" else 5):
        return "timeout", f"the time limit of {element} is near"
    if signal_name == "SIGUSR2":
        return "preempted", f"{element} has to give way"
    return "cancelled", f"{element} was cancelled"


def cancel(names: list[str]) -> None:
    """End every job of these names, whatever its number by now. Raises Unavailable."""
    for name in names:
        ask(["scancel", f"--name={name}"])


def requeue(element: str) -> None:
    """Put a running element back into the queue. Slurm may just be doing so itself, which is as good."""
    try:
        ask(["scontrol", "requeue", element])
    except Unavailable as error:
        print(f"requeue of {element}: {error}", flush=True)


class Watch:
    """Tells which owners of leases have ended, though their nodes cannot be looked at from here.

    A job is gone if Slurm showed it twice, some seconds apart, as ended, put back since, or not at all: an element
    that was cancelled while it waited leaves no trace, and a new job's may come late.
    """

    def __init__(self, clock: Callable[[], float]):
        self.clock = clock
        self.asked = float("-inf")
        self.absent: dict[tuple, float] = {}

    def gone(self, owners: list[dict]) -> list[dict]:
        """Of these owners (store.owner) those whose jobs have ended; [] if it is too early to ask again."""
        jobs = {_key(owner): owner for owner in owners if "job" in owner}
        if not jobs or self.clock() - self.asked < CONFIRM_SECONDS:
            return []
        self.asked = self.clock()
        try:
            found = {(e.name, e.id): e for e in elements(sorted({name for name, _, _ in jobs}))}
        except Unavailable:
            return []
        gone = []
        for key, owner in jobs.items():
            name, number, restarts = key
            element = found.get((name, number))
            # A controller that lost its state starts a task anew and does not count it as a restart.
            elsewhere = element and element.state == "RUNNING" and element.node != owner["node"]
            if element and alive(element) and element.restarts <= restarts and not elsewhere:
                self.absent.pop(key, None)
            elif self.clock() - self.absent.setdefault(key, self.asked) >= CONFIRM_SECONDS:
                gone.append(owner)
        return gone


def _key(owner: dict) -> tuple[str, str, int]:
    return owner["job"]["name"], owner["job"]["id"], owner["job"]["restarts"]


def last_words(owner: dict) -> tuple[str, str]:
    """(kind of failure, message) for an owner that ended without a word, by what Slurm remembers of its job.

    Where it has forgotten, by what its daemon wrote under the task's own output.
    """
    job = owner.get("job")
    if job is None:
        return "lost", f"its process {owner['pid']} on {owner['node']} ended without a word"
    state, wrote = _remembered(job), _written(owner)
    said = f"{job['id']} on {owner['node']} ended without a word: {state or 'Slurm has forgotten it'}"
    said += f"; {wrote}" if wrote else ""
    for kind, words in LAST_WORDS.items():
        if any(word in state for word in words):
            return kind, said
    return next((kind for kind, words in LAST_WORDS.items() if any(word in wrote for word in words)), "lost"), said


def _written(owner: dict) -> str:
    """The lines of Slurm's own that follow what a life of a task printed into slurm-<task>.txt; '' if none do."""
    path = Path(owner.get("log", "")).with_name(f"slurm-{owner['job']['id']}.txt") if "log" in owner else None
    try:
        lines = path.read_text(errors="replace").splitlines() if path else []
    except OSError:
        return ""
    life, found = -1, []
    for line in lines:
        if start := re.match(rf"{owner['job']['id']} on \S+, restart (\d+), ", line):
            life = int(start[1])
        elif life == owner["job"]["restarts"] and re.match(r"slurmstepd\S*: error: ", line):
            found.append(re.sub(r"^StepId=\S+ ", "", line.split(": error: ", 1)[1].strip("* ")))
    return "; ".join(dict.fromkeys(found))


def _remembered(job: dict) -> str:
    """What Slurm knows of a job's element: squeue first, then sacct, where there is one. '' if nothing."""
    state = ""
    with contextlib.suppress(Unavailable):
        for element in elements([job["name"]]):
            if (element.name, element.id) == (job["name"], job["id"]):
                if element.restarts > job["restarts"]:
                    return "put back into the queue"
                if alive(element):
                    return f"the task is {element.state} now"
                state = element.state
    with contextlib.suppress(Unavailable):
        words = ["sacct", "-n", "-P", "-D", "-j", job["id"], "-o", "State,MaxRSS,ReqMem"]
        state = accounted(ask(words, 10.0)) or state
    return state


def accounted(text: str) -> str:
    """The state in sacct's State|MaxRSS|ReqMem lines of a job's steps.

    Slurm calls many a job that was killed for its memory FAILED, so the memory that it used decides too.
    """
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 2]
    used, asked = (max((row[n] for row in rows), key=_megabytes, default="") for n in (1, 2))
    if rows and _megabytes(asked) and _megabytes(used) > FULL_MEMORY * _megabytes(asked):
        return f"OUT_OF_MEMORY, using {used} of {asked}"
    return rows[0][0].split(" ")[0] if rows else ""


def _megabytes(text: str) -> float:
    """Of sacct's 1024K or 4G (older ones: 4Gn for a node); 0 for what is not known."""
    found = re.fullmatch(r"([\d.]+)([KMGT])n?", text)
    return float(found[1]) * {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}[found[2]] if found else 0.0

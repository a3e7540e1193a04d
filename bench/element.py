"""One task of a sweep on Slurm: starts the workers, owns the signals, tells how a worker died, requeues.

A light process beside the workers, so that somebody is left to speak when the kernel kills one for its memory. It takes
no part in training; a worker that was told to stop writes its checkpoint itself.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench import Refusal, slurm
from bench.cluster import megabytes
from bench.compose import ROOT
from bench.full import say
from bench.store import Store, take
from bench.submit import Submission, digest_of, refuse

POLL_SECONDS = 0.25
IDLE_DEATHS = 3  # of workers that had no run, after which no other is started in their place


@dataclass
class Worker:
    """A worker's process, its log and, when it has ended, the most memory that it or a child of it had (bytes)."""

    process: subprocess.Popen
    log: Path
    peak: int

    def ended(self) -> bool:
        """Asked of the system here, since subprocess would throw the memory away."""
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if pid:
            self.process.returncode = os.waitstatus_to_exitcode(status)
            self.peak = usage.ru_maxrss * 1024
        return bool(pid)


class Element:
    """The task in hand."""

    def __init__(self, submission: Submission):
        self.submission = submission
        self.id, self.restarts = slurm.this_element()
        self.store = Store(Path(submission.where.results))
        self.workers: list[Worker] = []
        self.codes: list[int] = []
        self.started = 0
        self.idle_deaths = 0
        self.signal = ""
        self.deadline = float("inf")
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number, frame) -> None:
        """Hand the signal on; what follows from it is decided when the workers have ended."""
        name = signal.Signals(number).name
        if not self.signal:
            say(f"{name}: workers write a checkpoint and end")
            self.signal = name
            self.deadline = time.monotonic() + max(5.0, self.submission.cluster.warn - 15.0)
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                worker.process.send_signal(signal.SIGTERM if name == "SIGINT" else number)

    def start(self) -> None:
        log = self.submission.folder / f"log-{self.id}-{self.restarts}-{self.started}.txt"
        cluster = self.submission.cluster
        python = [*cluster.container, cluster.python or sys.executable]
        command = [*python, "-m", self.submission.module, "--submission", str(self.submission.folder)]
        with open(log, "w") as out:
            environment = {
                **os.environ,
                "MIXERBENCH_LOG": str(log),
                "MIXERBENCH_SUBMISSION": str(self.submission.folder),
            }
            process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        self.workers.append(Worker(process, log, 0))
        self.started += 1

    def run(self) -> int:
        """To the end of the workers: 2 if one refused its input, 1 if a run failed or a worker broke down, else 0."""
        for _ in range(self.submission.cluster.side_by_side):
            self.start()
        while self.workers and time.monotonic() < self.deadline:
            time.sleep(POLL_SECONDS)
            for worker in list(self.workers):
                if worker.ended():
                    self.workers.remove(worker)
                    self.ended(worker)
        if self.signal == "SIGUSR2":
            self.put_back()
        return max([*self.codes, int(self.gave_up())])

    def gave_up(self) -> bool:
        """Whether a run that failed here will not be tried again: Slurm is to show this task as failed."""
        for run_id in self.submission.runs:
            failures = self.store.failures(run_id)
            here = any(failure.get("job", {}).get("id") == self.id for failure in failures)
            if here and not self.store.has(run_id) and self.store.given_up(run_id, self.submission.where.retries):
                return True
        return False

    def ended(self, worker: Worker) -> None:
        """A worker that was killed is spoken for and replaced, though not for ever if it had no run in hand."""
        code = worker.process.returncode
        if code < 0 and not self.signal:
            self.idle_deaths += not self.bury(worker, -code)
        if code < 0 and not self.signal and self.idle_deaths <= IDLE_DEATHS:
            self.start()
        elif code < 0 and self.signal:
            self.codes.append(0)  # by the signal, before it listened to it
        else:
            self.codes.append(code if 0 <= code <= 2 else 1)

    def bury(self, worker: Worker, number: int) -> bool:
        """Note why the run of a dead worker failed and free it; False if it had none."""
        limit = memory_limit(self.submission)
        used = f"{worker.peak / 1e6:.0f} MB of {limit / 1e6:.0f}" if limit else f"{worker.peak / 1e6:.0f} MB"
        kind = "oom" if number == signal.SIGKILL and limit and worker.peak > slurm.FULL_MEMORY * limit else "lost"
        name = signal.Signals(number).name
        found = False
        for run_id in self.submission.runs:
            folder = self.store.folder(run_id)
            lease = _lease_of(folder, worker.process.pid)
            if lease:
                message = f"the worker was killed by {name} in {self.id}, using {used}"
                self.store.fail(run_id, kind, message, lease.bereft)
                lease.release()
                found = True
        say(f"worker {worker.process.pid} was killed by {name}, using {used}; {worker.log}")
        return found

    def put_back(self) -> None:
        most = self.submission.cluster.requeues
        if self.restarts >= most:
            say(f"was put back {self.restarts} times already; `mixerbench sweep … --on …` goes on")
            return
        say("putting this task back into the queue")
        slurm.requeue(self.id)


def _lease_of(folder: Path, pid: int):
    """The lease that a dead process of this task left in a run's folder, taken over; None if there is none."""
    held = False
    for path in folder.glob("lease-*.json"):
        with contextlib.suppress(OSError):
            held |= f'"pid": {pid},' in path.read_text()
    lease = take(folder) if held else None
    if lease and (lease.bereft is None or lease.bereft["pid"] != pid):
        lease.release()
        return None
    return lease


def memory_limit(submission: Submission) -> float:
    """Bytes that the task asked for, a worker's share of it; 0 if it did not say."""
    cluster = submission.cluster
    return megabytes(cluster.memory) * 2**20 / cluster.side_by_side if cluster.memory else 0.0


def main(arguments: list[str]) -> int:
    os.umask(0o077)
    folder = Path(arguments[0])
    try:
        submission = Submission.read(folder)
        if digest_of(ROOT) != submission.code:
            raise Refusal(f"{ROOT} is not the code that was submitted ({submission.code}); submit again")
        element = Element(submission)
        where = os.environ.get("SLURMD_NODENAME", "")
        say(f"{element.id} on {where}, restart {element.restarts}, {len(os.sched_getaffinity(0))} CPUs")
        return element.run()
    except (Refusal, OSError) as error:  # OSError: a disk without room even for a log
        refuse(error, folder)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

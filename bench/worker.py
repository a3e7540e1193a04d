"""The worker: a long-lived process that takes runs of a sweep by lease, one by one, until none is left or time is up.

Who starts it (a terminal, a Slurm task) changes nothing here; all that workers share is the store.
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from bench import Refusal, slurm, tune
from bench.compose import make_where, parse_overrides
from bench.config import Run
from bench.full import say
from bench.queue import Queue
from bench.ranks import execute_ranks
from bench.record import Record
from bench.run import execute
from bench.store import SPARED, Lease, Store
from bench.submit import Submission, refuse
from bench.sweep import grid, load, named, ordered, work_of
from bench.where import results
from bench.words import numbers

POLL_SECONDS = 0.5
POLL_AT_MOST = 8.0  # every look costs the shared file system a few calls a run
RENEW_SECONDS = 15.0
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"


class Stop:
    """Asked to stop by a signal or by the clock; training looks at it after each optimiser step.

    Between steps (data, compilation, evaluation) nobody looks, so a second Ctrl-C ends the process there and then.
    """

    def __init__(self, until: float):
        self.until = until  # seconds of the epoch
        self.signal = ""  # name of the first that came
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._handle)

    @property
    def signalled(self) -> bool:
        return bool(self.signal)

    def _handle(self, number, frame) -> None:
        if self.signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = self.signal or signal.Signals(number).name

    def __call__(self) -> bool:
        return self.signalled or time.time() > self.until


@dataclass(frozen=True)
class Task:
    """The Slurm task that a worker is part of."""

    element: str  # of the array: '123_4'
    restarts: int
    warn: float  # seconds between USR2 and the end
    idle: float  # seconds after which a worker that has nothing to do leaves
    watch: slurm.Watch


def work(queue: Queue, stop: Stop, task: Task | None = None) -> bool:
    """Take and train runs until all are settled, none can be started, or `stop`; whether none of them failed."""
    fine, idle, nap = True, time.time(), POLL_SECONDS
    while not stop():
        busy = queue.waiting()  # asked first: who is no longer busy after `next` may have left us a ready run
        taken = queue.next(stop.until)
        if taken:
            fine &= attempt(*taken, queue, stop, task)
            idle, nap = time.time(), POLL_SECONDS
        elif not (busy or queue.waiting()):
            break
        elif task and time.time() - idle > task.idle:
            say("nothing to do but to wait for other tasks: leaving")
            break
        else:
            if task:
                queue.find_dead(task.watch)
            time.sleep(nap)
            nap = min(nap * 1.5, POLL_AT_MOST)
    return fine


def attempt(run: Run, lease: Lease, queue: Queue, stop: Stop, task: Task | None) -> bool:
    """Train one run under its lease; what goes wrong becomes a failure file, and the next run goes on."""
    done, robbed = threading.Event(), threading.Event()
    threading.Thread(target=_renew, args=(lease, done, robbed), daemon=True).start()
    try:
        ended, failure = _trained(run, queue, stop, robbed)
        if robbed.is_set() or _taken(lease):
            say(f"{run.label} {named(run)}: another worker took us for dead and has it now", error=True)
            failure = None  # the other one noted that we were lost; what our writing meets there is no fault of the run
        elif not ended and failure is None and task and stop.signalled:
            failure = slurm.why_stopped(stop.signal, task.element, task.restarts, task.warn)
        if failure:
            queue.store.fail(run.id, *failure)
    finally:
        done.set()
        with contextlib.suppress(OSError):  # then the lease ends with this process
            lease.release()
    return failure is None or failure[0] in SPARED


def _trained(run: Run, queue: Queue, stop: Stop, robbed: threading.Event) -> tuple[bool, tuple[str, str] | None]:
    """Whether the run has its record now; kind and message of what went wrong, None if nothing did."""
    train = execute if queue.where.devices * queue.where.nodes == 1 else execute_ranks
    begun = time.perf_counter()
    try:
        tune.ask(run, queue.store)
        record = train(run, queue.where, lambda: stop() or robbed.is_set())
    except Refusal:
        raise
    except Exception as error:
        if stop.signalled:  # then what went wrong is what the signal did to a child of ours
            return False, None
        kind, text = "oom" if out_of_memory(error) else "error", str(error)
        text = text[max(0, text.find(NO_MEMORY)) :]  # torch begins with the place in its own code
        say(f"{run.label} {named(run)}: {kind}: {text}", error=True)
        return False, (kind, f"{type(error).__name__}: {text}\n{traceback.format_exc()}")
    if record:
        say(summary(run, record, time.perf_counter() - begun))
    return record is not None, None


def out_of_memory(error: Exception) -> bool:
    """Of the device, of Python, or of torch on a processor, which has no class of its own for it."""
    return type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError) or NO_MEMORY in str(error)


def _renew(lease: Lease, done: threading.Event, robbed: threading.Event) -> None:
    while not done.wait(RENEW_SECONDS):
        with contextlib.suppress(OSError):
            lease.renew()
            if not lease.held():
                robbed.set()


def _taken(lease: Lease) -> bool:
    """Whether somebody else has it now; not if the file system does not say."""
    with contextlib.suppress(OSError):
        return not lease.held()
    return False


def summary(run: Run, record: Record, seconds: float) -> str:
    figures = " ".join(f"{k}={v:.4g}" for k, v in record.metrics.items())
    outcome = figures if record.outcome == "ok" else f"{record.outcome}: {record.reason}"
    return f"{run.label} {named(run)}: {outcome} ({seconds:.1f} s)"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.worker")
    parser.add_argument("sweep", type=Path, nargs="?")
    parser.add_argument("--until", type=float, default=float("inf"), help="stop at this second of the epoch")
    parser.add_argument("--seeds", type=numbers, default=None, help="of the sweep's seeds, these only")
    parser.add_argument("--where", nargs="*", default=[], metavar="where.key=value")
    parser.add_argument("--submission", type=Path, help="folder of a submission to Slurm, instead of all others")
    options = parser.parse_args(arguments)
    try:
        stop = Stop(options.until)
        if options.submission:
            return serve(Submission.read(options.submission), stop)
        where = make_where(parse_overrides(options.where))
        work(Queue(work_of(load(options.sweep), options.seeds), Store(results(where)), where), stop)
    except Refusal as error:
        refuse(error, options.submission)
        return 2
    return 0


def serve(submission: Submission, stop: Stop) -> int:
    """As part of a Slurm task; 1 if a run failed."""
    os.umask(0o077)
    where, cluster = submission.where, submission.cluster
    element, restarts = slurm.this_element()
    task = Task(element, restarts, cluster.warn, cluster.idle * 60, slurm.Watch(time.monotonic))
    queue = Queue(ordered(grid(load(submission.sweep_file))), Store(results(where)), where)
    return int(not work(queue, stop, task))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

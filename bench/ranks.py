"""One run in several processes, a device each, on this node or (where.nodes) on all nodes of a Slurm task.

The worker starts the ranks of its own node and, by one srun, a follower on each other node that starts the ranks there.
A follower keeps a connection to the worker: when that breaks, worker or node are gone, and its ranks end at once, so
that none outlives the lease. Rank 0 alone decides to stop and writes.
"""

import contextlib
import json
import multiprocessing
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from multiprocessing.queues import SimpleQueue
from pathlib import Path

from bench import Refusal
from bench.config import Run, Where
from bench.full import say
from bench.record import Record
from bench.run import execute
from bench.store import Store
from bench.submit import Submission
from bench.sweep import grid, load, ordered
from bench.where import results

POLL_SECONDS = 0.5
JOIN_SECONDS = 300.0  # until all followers are there: interpreters load slowly from a busy file system
END_SECONDS = 60.0  # for the last words of the other nodes, when our own ranks have ended
TOLD = 2_000  # characters of what went wrong in a rank: a pipe takes them at once, whoever is killed meanwhile
LAUNCHES = 3  # of an srun that brings nobody: a node that is held up for a moment refuses a step ("credential expired")


def execute_ranks(run: Run, where: Where, stop) -> Record | None:
    """`execute` in where.nodes x where.devices processes, which find each other as Lightning's DDP expects."""
    address = "127.0.0.1" if where.nodes == 1 else socket.gethostname()
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(reserved(address)).getsockname()[1]
        step = stack.enter_context(Followers(run, where, address, port)) if where.nodes > 1 else None
        ranks, faults = started(run, where, 0, address, port)
        while any(p.is_alive() for p in ranks):
            stopping = stop()
            if stopping and ranks[0].is_alive():
                ranks[0].terminate()
            if step and not stopping:
                step.launch_again()
            if any(p.exitcode not in (None, 0) for p in ranks) or (step and step.process.poll()):
                for process in ranks:
                    process.kill()
            ranks[0].join(POLL_SECONDS)
        codes = [p.exitcode for p in ranks]
        fault = None if faults.empty() else faults.get()
        if isinstance(fault, Refusal | MemoryError):
            raise fault
        if any(codes):
            told = f", the first with {fault}" if fault else ""
            raise RuntimeError(f"ranks ended with exit codes {codes}{told}{step.said() if step else ''}")
        if step and step.process.wait(END_SECONDS):
            raise RuntimeError(f"ranks ended well here{step.said()}")
    return Store(results(where)).record(run.id)


def reserved(address: str) -> socket.socket:
    """A free port of this node: nobody is given it while the socket is open, and rank 0 may listen there all the same,
    since both allow it (SO_REUSEADDR) and only one listens."""
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind((address, 0))
    return probe


def started(run: Run, where: Where, node: int, address: str, port: int) -> tuple[list, SimpleQueue]:
    """The ranks of one node, as processes, and what went wrong in them, for the worker to raise as its own."""
    context = multiprocessing.get_context("spawn")
    faults = context.SimpleQueue()
    arguments = [(run, where, node, local, address, port, os.getpid(), faults) for local in range(where.devices)]
    ranks = [context.Process(target=_rank, args=each, daemon=False) for each in arguments]
    for process in ranks:
        process.start()
    return ranks, faults


def _rank(
    run: Run, where: Where, node: int, local: int, address: str, port: int, parent: int, faults: SimpleQueue
) -> None:
    from bench.worker import Stop, out_of_memory

    world = {"MASTER_ADDR": address, "MASTER_PORT": port, "WORLD_SIZE": where.nodes * where.devices}
    world |= {"NODE_RANK": node, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": where.devices}
    world |= {"RANK": node * where.devices + local}
    os.environ.update({key: str(value) for key, value in world.items()})
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        execute(run, where, Stop(float("inf")))
    except Exception as error:
        if isinstance(error, Refusal):
            faults.put(Refusal(str(error)[:TOLD]))
            sys.exit(2)
        text = f"{type(error).__name__}: {error}"[:TOLD]
        faults.put(MemoryError(text) if out_of_memory(error) else RuntimeError(text))
        raise


def _end_with(parent: int) -> None:
    """A rank whose worker or follower was killed: nobody holds its lease, and it may wait for ranks that are gone."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


class Followers:
    """The srun that has a follower on each other node of our job, and our ends of their connections."""

    def __init__(self, run: Run, where: Where, address: str, port: int):
        self.secret = secrets.token_hex(16)
        self.server = socket.create_server((address, 0))
        self.connections: list[socket.socket] = []
        others = where.nodes - 1
        submission = os.environ.get("MIXERBENCH_SUBMISSION")
        if submission is None:
            raise Refusal(f"where.nodes={where.nodes}: a run on several nodes is a task of `sweep --on`")
        order = [submission, run.id, address, self.server.getsockname()[1], port]
        cpus = os.environ.get("SLURM_CPUS_PER_TASK", "1")  # srun does not take it over by itself
        words = [
            f"--nodes={others}",
            f"--ntasks={others}",
            "--ntasks-per-node=1",
            "--relative=1",
            "--kill-on-bad-exit=1",
        ]
        words += [f"--cpus-per-task={cpus}", sys.executable, "-m", "bench.ranks", *map(str, order)]
        self.command = ["srun", *words]
        self.environment = {k: v for k, v in os.environ.items() if k != "SLURM_CPU_BIND"}
        self.environment["MIXERBENCH_SECRET"] = self.secret
        self.launches = 0
        self._launch()
        threading.Thread(target=self._accept, args=(others,), daemon=True).start()

    def _launch(self) -> None:
        self.launches += 1
        self.process = subprocess.Popen(self.command, env=self.environment, start_new_session=True)

    def launch_again(self) -> None:
        """If srun ended badly and brought no follower, as nothing is lost then."""
        if self.process.poll() and not self.connections and self.launches < LAUNCHES:
            say(f"srun of the other nodes: {self.process.returncode}; launch {self.launches + 1} of {LAUNCHES}")
            self._launch()

    def _accept(self, others: int) -> None:
        """Strangers, who do not know the secret, are sent away."""
        self.server.settimeout(JOIN_SECONDS)
        with contextlib.suppress(OSError):
            while len(self.connections) < others:
                connection, _ = self.server.accept()
                connection.settimeout(10)
                if connection.makefile().readline().strip() == self.secret:
                    self.connections.append(connection)
                else:
                    connection.close()

    def __enter__(self) -> "Followers":
        return self

    def __exit__(self, *_) -> None:
        """Ends whoever is still there: the connections break."""
        for one in (*self.connections, self.server):
            one.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def said(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        return f"; srun of the other nodes: {self.process.returncode}"


def main(arguments: list[str]) -> int:
    """A follower."""
    folder, run_id, address, control, port = arguments
    for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # rank 0 decides
    submission = Submission.read(Path(folder))
    run = next(r for r in ordered(grid(load(submission.sweep_file))) if r.id == run_id)
    lead = socket.create_connection((address, int(control)), timeout=60)
    lead.settimeout(None)
    lead.sendall(f"{os.environ.pop('MIXERBENCH_SECRET')}\n".encode())
    node = int(os.environ["SLURM_PROCID"]) + 1
    ranks, faults = started(run, submission.where, node, address, int(port))
    print(json.dumps({"ranks of": os.environ.get("SLURMD_NODENAME", ""), "node": node, "run": run_id}), flush=True)
    threading.Thread(target=_watch, args=(lead, ranks), daemon=True).start()
    while any(p.is_alive() for p in ranks) and not any(p.exitcode for p in ranks):
        time.sleep(POLL_SECONDS)
    for process in ranks:
        process.kill()  # nothing to one that has ended
        process.join()
    if not faults.empty():
        say(str(faults.get()), error=True)
    return int(any(p.exitcode for p in ranks))


def _watch(lead: socket.socket, ranks: list) -> None:
    """The worker never sends: what is read is its end."""
    with contextlib.suppress(OSError):
        lead.recv(1)
    for process in ranks:
        process.kill()
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A cluster file: what a task of a sweep asks Slurm for, and how its environment is set up. Never part of a run's id.

Every value but the lines of `setup` reaches Slurm or the batch script as data, so none of them may hold a control
character: a newline in `partition` would become a line of the script. slurm/template.yaml says what each key means.
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path

from bench import Refusal
from bench.compose import load_yaml
from bench.config import at_least, build


@dataclass(frozen=True)
class Cluster:
    partition: str
    account: str
    qos: str
    constraint: str
    reservation: str
    exclude: str
    gres: str
    memory: str  # '4G', '500M'; '': the partition's default
    cpus: int
    time: int  # minutes
    warn: int  # seconds
    requeues: int
    idle: float  # minutes
    pack: int
    side_by_side: int
    modules: tuple[str, ...]
    container: tuple[str, ...]
    python: str
    setup: tuple[str, ...]

    def __post_init__(self):
        least = {"cpus": 1, "time": 1, "warn": 1, "requeues": 0, "idle": 0, "pack": 1, "side_by_side": 1}
        at_least("cluster", self, least)
        for field in fields(self):
            value = getattr(self, field.name)
            for text in value if isinstance(value, tuple) else [value]:
                if isinstance(text, str) and re.search(r"[\x00-\x1f\x7f\x85\u2028\u2029]", text):
                    raise Refusal(f"cluster.{field.name} holds a control character: {text!r}")
        if self.memory and not re.fullmatch(r"[1-9]\d*[KMGT]?", self.memory):
            raise Refusal(f"cluster.memory must be a number and K, M, G or T, like 4G, got {self.memory!r}")
        if self.warn >= self.time * 60:
            raise Refusal(f"cluster.warn: {self.warn} s ahead of the end is before the start of {self.time} minutes")


def load(path: Path) -> Cluster:
    return build(Cluster, load_yaml(path), "cluster")


def requests(cluster: Cluster) -> list[str]:
    """The words of sbatch for what a task needs; keys that are '' are left to the cluster."""
    asked = ("partition", "account", "qos", "constraint", "reservation", "exclude", "gres")
    words = [f"--{key}={getattr(cluster, key)}" for key in asked if getattr(cluster, key)]
    words += [f"--mem={cluster.memory}"] if cluster.memory else []
    # B: the signal is for the batch script's own process, which hands it on. Not USR1: NCCL takes that one.
    return [*words, f"--cpus-per-task={cluster.cpus}", f"--time={cluster.time}", f"--signal=B:USR2@{cluster.warn}"]


def gpus(cluster: Cluster) -> int | None:
    """Of a task, by `gres`; None where it names none, so that the cluster chooses."""
    counts = re.findall(r"(?:^|,)gpu(?::[a-zA-Z]\w*)?(?::(\d+))?(?=,|$)", cluster.gres)
    return sum(int(count or 1) for count in counts) if counts else None


def megabytes(memory: str) -> float:
    """Of '4G', '500M' or a bare number (which Slurm reads as megabytes)."""
    scale = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}
    return float(memory.rstrip("KMGT")) * scale.get(memory[-1], 1)

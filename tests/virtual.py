"""The tests' own Slurm cluster (virtual_slurm.sh) as a context, and what the tests do to it."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

SCRIPT = Path(__file__).with_name("virtual_slurm.sh")
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue")


class Virtual:
    """Four nodes n1 … n4 of two processors; while it is entered, SLURM_CONF names it. One may be inside another."""

    up = 0

    def __init__(self, accounting: bool, lines: str):
        self.settings = {"SLURM_CI_ACCT": "dbd" if accounting else "none", "SLURM_CI_CONF": lines}
        self.accounting = accounting
        self.before: str | None = None
        self.conf = ""

    @staticmethod
    def absent() -> str:
        """Why there can be no cluster here, '' if there can."""
        path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
        missing = [name for name in NEEDED if not shutil.which(name, path=path)]
        if missing:
            return f"Slurm is not installed (no {', '.join(missing)})"
        return "" if os.geteuid() == 0 else "only root can start a virtual Slurm cluster"

    def __call__(self, *words: str) -> str:
        environment = {**os.environ, **self.settings}
        done = subprocess.run([SCRIPT, *words], capture_output=True, text=True, env=environment, timeout=180)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def __enter__(self) -> "Virtual":
        folder, port = (
            os.environ.get("SLURM_CI_DIR", "/dev/shm/mixerbench-slurm"),
            os.environ.get("SLURM_CI_PORT", "26817"),
        )
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])  # each process of the tests has its own clusters
        number = 4 * worker + Virtual.up
        self.settings |= {"SLURM_CI_DIR": f"{folder}-{number}", "SLURM_CI_PORT": str(int(port) + 40 * number)}
        Virtual.up += 1
        try:
            self("stop")
            self("start")
        except BaseException:
            Virtual.up -= 1
            self("stop")
            raise
        self.before = os.environ.get("SLURM_CONF")
        self.conf = os.environ["SLURM_CONF"] = self("env").split("=", 1)[1].strip()
        return self

    def __exit__(self, *_) -> None:
        self("stop")
        Virtual.up -= 1
        os.environ.pop("SLURM_CONF", None)
        if self.before is not None:
            os.environ["SLURM_CONF"] = self.before


def slurm(*words: str) -> str:
    """What a command of Slurm prints."""
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


def wait(true: Callable[[], object], seconds: float, what: str | Callable[[], str] = "") -> object:
    """The first true value of `true()`, which is asked until then; `what`: how things stand if it never is."""
    end = time.monotonic() + seconds
    while not (value := true()):
        assert time.monotonic() < end, f"not within {seconds} s: {what() if callable(what) else what}"
        time.sleep(0.1)
    return value

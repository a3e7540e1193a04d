"""Workers that stand still at a known step: what a test does to them finds them there, whatever the machine's speed."""

import sys
from pathlib import Path

WORKER = """#!{python}
import sys, time
from pathlib import Path
from bench import train, worker
ended = train.Training.on_train_batch_end
def still(self, *given):
    while self.done == {step} and not self.setting.should_stop() and not Path({go!r}).exists():
        time.sleep(0.01)
    ended(self, *given)
train.Training.on_train_batch_end = still
sys.exit(worker.main(sys.argv[sys.argv.index("bench.worker") + 1 :]))
"""


def standing(folder: Path, step: int) -> Path:
    """A program in the place of `python`, or before it, where a worker is started: each run stands still at the end of
    this step, until the worker is asked to stop or `folder`/go is there."""
    program = folder / "standing"
    program.write_text(WORKER.format(python=sys.executable, step=step, go=str(folder / "go")))
    program.chmod(0o700)
    return program


def launcher(program: Path) -> list[str]:
    """The words of `mixerbench` whose workers are that program."""
    code = f"import sys; sys.executable = {str(program)!r}; from bench import cli; sys.exit(cli.main())"
    return [sys.executable, "-c", code]

"""A process of this code, or of a copy of it, that need not load torch again: a fork of the tests' own process."""

import importlib
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from pathlib import Path

ONE_AT_A_TIME = threading.Lock()  # the filters of warnings are of all threads


def forked(module: str, words: list[str], root: Path, folder: Path, seconds: float) -> subprocess.CompletedProcess:
    """`python -m module words…` in `folder` with the code that lies in `root`: exit code, output, errors."""
    import lightning  # noqa: F401  loaded once, here

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        with ONE_AT_A_TIME, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads; ours hold no lock
            process = os.fork()
        if not process:
            _child(module, words, root, folder, out.fileno(), err.fileno())
        code = _awaited(process, seconds)
        texts = [(file.seek(0), file.read().decode())[1] for file in (out, err)]
    return subprocess.CompletedProcess([module, *words], code, *texts)


def _awaited(process: int, seconds: float) -> int:
    end = time.monotonic() + seconds
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(process, 9)
            os.waitpid(process, 0)
            raise TimeoutError(f"process {process} did not end within {seconds} s")
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(ended[1])


def _child(module: str, words: list[str], root: Path, folder: Path, out: int, err: int) -> None:
    code = 70
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        os.chdir(folder)
        os.environ |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        for name in [name for name in sys.modules if name.split(".")[0] == "bench"]:
            del sys.modules[name]
        sys.path.insert(0, str(root))
        sys.argv = [module, *words]
        main = importlib.import_module(module).main
        code = main(words) if module == "bench.worker" else main()
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

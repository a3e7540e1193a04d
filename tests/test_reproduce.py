"""README's 'Reproduce the tables' as a user of a cluster of 8-GPU nodes walks it, up to the tasks in the queue.

The hub is a stand-in: GLUE in the hub's layout from the local files (of MNLI, QNLI and QQP samples), C4 and ImageNet
are made up. The nodes are known to Slurm, but there are none: the tasks wait.
"""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from bench.compose import ROOT, make_run
from bench.registry import make_task
from bench.store import Store
from bench.submit import submissions
from bench.tasks.base import Places
from bench.tasks.glue import SUBSETS
from tests.hub import Hub
from tests.test_image_tasks import encoded, write
from tests.test_paper_sweeps import GOLDEN, SWEEPS
from tests.test_shards import jsonl
from tests.virtual import Virtual, slurm

pytestmark = [pytest.mark.slurm, pytest.mark.data]
PARTIAL = ("mnli", "qnli", "qqp")
NODES = (
    "NodeName=g[1-8] NodeAddr=127.0.0.1 Port=1 CPUs=96 RealMemory=900000 Gres=gpu:8\nPartitionName=eight Nodes=g[1-8]"
)
# As Slurm shows them, which by its version has a range of nodes and another mark after 'gres'.
ASKED = {"NumNodes": "1(-1)?", "CPUs/Task": "96", "MinMemoryNode": "800G", "TresPerNode": "gres.gpu:8"}
ASKED |= {"TimeLimit": "1-00:00:00", "Partition": "eight"}


@pytest.fixture(scope="module")
def local() -> Path:
    return Path(os.environ["MIXERBENCH_DATA"])


@pytest.fixture(scope="module")
def sets(tmp_path_factory, local) -> dict[tuple[str, str], Path]:
    """Data sets of the hub at the commits that the tasks pin, and the model that has the vocabulary, as folders."""
    tree = tmp_path_factory.mktemp("tree")
    texts = [f"Document {n} says that {n} and {n + 1} are {2 * n + 1}." for n in range(30)]
    jsonl(tree / "c4/en/c4-train.00000-of-00002.json.gz", texts[:20])
    jsonl(tree / "c4/en/c4-train.00001-of-00002.json.gz", texts[20:])
    jsonl(tree / "c4/en/c4-validation.00000-of-00001.json.gz", texts[:5])
    card(tree / "c4", [("en", "train", "en/c4-train.*.json.gz"), ("en", "validation", "en/c4-validation.*.json.gz")])
    images = [encoded(np.full((240, 240, 3), shade, np.uint8)) for shade in range(8)]
    (tree / "imagenet/data").mkdir(parents=True)
    for split in ("train", "validation"):
        write(tree / "imagenet/data", f"{split}-00000-of-00001.parquet", images, list(range(8)))
    card(tree / "imagenet", [("default", s, f"data/{s}-*") for s in ("train", "validation")])
    rows = []
    for subset, spec in SUBSETS.items():
        for split in ("train", *("validation" if p == "validation" else f"validation_{p}" for p in spec.held_out)):
            file = tree / "glue" / subset / f"{split}-00000-of-00001.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.symlink_to(local / "glue" / subset / f"{split}.parquet")
            rows.append((subset, split, f"{subset}/{split}-*"))
    card(tree / "glue", rows)
    names = {"c4": "masked_lm_c4", "imagenet": "images_imagenet", "glue": "glue_rte_hub"}
    pins = {k: yaml.safe_load((ROOT / "configs" / "task" / f"{v}.yaml").read_text())["data"] for k, v in names.items()}
    found = {(f"datasets/{pins[name]['hub']}", pins[name]["revision"]): tree / name for name in names}
    (tree / "bert").mkdir()
    (tree / "bert" / "vocab.txt").symlink_to(local / "tokenizer" / "bert-base-uncased-vocab.txt")
    return found | {("models/google-bert/bert-base-uncased", "0" * 40): tree / "bert"}


def card(folder: Path, rows: list[tuple[str, str, str]]) -> None:
    """The page of a data set, with its configurations: (configuration, split, files)."""
    known: dict[str, list[str]] = {}
    for name, split, files in rows:
        known.setdefault(name, []).append(f"  - {{split: {split}, path: '{files}'}}")
    lines = [line for name, each in known.items() for line in (f"- config_name: {name}", "  data_files:", *each)]
    (folder / "README.md").write_text("\n".join(["---", "configs:", *lines, "---", ""]))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A checkout in which partition is filled in, and an empty folder for the data."""
    home = tmp_path_factory.mktemp("home")
    for part in ("bench", "configs", "sweeps", "slurm"):
        shutil.copytree(ROOT / part, home / part, ignore=shutil.ignore_patterns("__pycache__"))
    file = home / "slurm" / "eight_gpus.yaml"
    file.write_text(file.read_text().replace('partition: ""', "partition: eight"))
    (home / "data").mkdir()
    (home / "bin").mkdir()
    (home / "bin" / "mixerbench").write_text(f'#!/bin/sh\nexec {sys.executable} -m bench.cli "$@"\n')
    (home / "bin" / "mixerbench").chmod(0o755)
    return home


def call(home: Path, line: str, **more: str) -> str:
    """What a line of README prints in the checkout; without a network, but for the hub in `more`."""
    path = f"{home / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    own = {"PATH": path, "PYTHONPATH": str(home), "HF_HOME": str(home / "hf")}
    own |= {"MIXERBENCH_DATA": str(home / "data"), "HF_HUB_OFFLINE": "" if more else "1"} | more
    done = subprocess.run(
        ["bash", "-c", line], cwd=home, env=os.environ | own, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def readme() -> list[str]:
    """The commands of the section."""
    part = (ROOT / "README.md").read_text().split("## Reproduce the tables")[1].split("\n## ")[0]
    return [line.strip() for line in part.splitlines() if line.startswith("    ")]


@pytest.fixture(scope="module")
def fetched(home, sets) -> str:
    """What the commands of the data print: all before the first that trains."""
    lines = list(itertools.takewhile(lambda line: not line.startswith("python"), readme()))
    with Hub(sets) as hub:
        said = "".join(call(home, line, **hub.environment(home / "hf")) for line in lines)
    read = [path for path in hub.asked if path.startswith("/datasets/") or "/tree/" in path]
    assert read and all(any(commit in path for _, commit in sets) for path in read)
    return said


def test_all_data_come_from_the_hub_and_glue_is_what_the_local_files_hold(fetched, home, local):
    assert (
        fetched.count("downloaded") == 2 * len(SUBSETS) + 1 and fetched.count("vocab.txt verified") == len(SUBSETS) + 1
    )
    assert fetched.count("prepared from hf://datasets/allenai/c4@") == 3 and fetched.count("imagenet-1k@") == 2
    script = "import sys; from tests.test_reproduce import same_examples; same_examples(*sys.argv[1:])"
    cache, own = str(home / "own"), {"HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "MIXERBENCH_DATA": str(local)}
    subprocess.run([sys.executable, "-c", script, str(local), cache], cwd=ROOT, env=os.environ | own, check=True)


def same_examples(data: str, cache: str) -> None:
    """In a process of its own, since `datasets` reads its variables once."""
    places = Places(Path(data), Path(cache))
    for subset in SUBSETS:
        names = f"paper_{subset}", f"table2_mini_{subset}{'_small' * (subset in PARTIAL)}"
        hub, own = (make_task(make_run(name, "identity", {}, 0, 0), places) for name in names)
        assert hub.args.data.hub and not own.args.data.hub
        hub.prepare(), own.prepare()
        assert hub.examples.keys() == own.examples.keys()
        for part, examples in hub.examples.items():
            assert all(map(np.array_equal, examples, own.examples[part])), (subset, part)


def test_every_table_is_submitted_to_nodes_of_eight_gpus(fetched, home):
    (line,) = (line for line in readme() if line.startswith("mixerbench sweep"))
    with Virtual(accounting=False, lines=NODES):
        for name in SWEEPS:
            loaders = " where.loaders=12" * (name == "table5")
            said = call(home, line.replace("table2_paper", name) + loaders)
            (made,) = submissions(Store(home / "results").root, name)
            assert f"{len(made.runs)} tasks submitted" in said
            assert sum(array["elements"] for array in made.arrays) == len(made.runs)
            for array in made.arrays:
                assert script_of(array["job"], made.folder.name, home) == golden(name)
                told = dict(w.split("=", 1) for w in slurm("scontrol", "show", "job", array["job"]).split() if "=" in w)
                assert all(re.fullmatch(value, told[key]) for key, value in ASKED.items()), told


def script_of(job: str, submission: str, home: Path) -> str:
    """The batch script that Slurm keeps, in the golden's words."""
    text = slurm("scontrol", "write", "batch_script", job, "-")
    text = (
        text.replace(submission, "UUID").replace(str(home), "/home/me").replace(sys.executable, "/opt/venv/bin/python")
    )
    return re.sub(r"snapshots/\w+", "snapshots/0123", text).strip()


def golden(name: str) -> str:
    return (GOLDEN / f"slurm_{name}.txt").read_text().split("\nsbatch\n")[0].strip()

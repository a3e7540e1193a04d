"""The import table of the design: what each room may know, and sizes that keep the house small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
FILES = sorted(BENCH.rglob("*.py"))
HEAVY = {
    "torch",
    "lightning",
    "hydra",
    "omegaconf",
    "optuna",
    "submitit",
    "kornia",
    "datasets",
    "pandas",
    "matplotlib",
    "seaborn",
}

# Room -> heavy libraries and other rooms of this package that its lines may import, be it inside a function.
MAY = {
    "seeds": ("", ""),
    "strict": ("", ""),
    "space": ("", "strict"),
    "architecture": ("", "strict"),
    "config": ("", "architecture space strict"),
    "plugins": ("", ""),
    "compose": ("hydra omegaconf", "config plugins space strict"),
    "mixers": ("torch", "kernels mixers"),
    "kernels": ("torch", "kernels"),
    "tasks": ("torch kornia datasets", "tasks seeds"),
    "registry": ("torch", "config compose kernels mixers plugins seeds shells tasks"),
    "shells": ("torch", "config kernels mixers shells"),
    "directions": ("torch", "config mixers shells"),
    "layers": ("torch", "config directions mixers shells"),
    "backbone": ("torch", "config kernels layers mixers seeds shells tasks"),
    "capacity": ("", "backbone config mixers record registry shells tasks"),
    "replay": ("torch", ""),
    "compiling": ("torch", "backbone"),
    "weights": ("torch", ""),
    "train": ("torch lightning", "backbone compiling config full replay seeds shells tasks weights"),
    "evaluate": ("torch", "backbone tasks"),
    "record": ("", "config"),
    "full": ("", ""),
    "whole": ("", ""),
    "store": ("", "full record whole"),
    "merge": ("", "record store whole"),
    "provenance": ("torch", "compose config plugins record"),
    "where": ("torch", "compose config tasks"),
    "run": (
        "torch",
        "backbone capacity config evaluate full provenance record registry seeds store tasks train tune weights where "
        "whole",
    ),
    "tune": ("optuna", "config record space store whole"),
    "matching": ("", "strict"),
    "sweep": ("", "compose config matching space"),
    "cluster": ("", "compose config"),
    "slurm": ("", ""),
    "submit": ("", "cluster compose config full provenance slurm store whole"),
    "element": ("", "cluster compose full slurm store submit"),
    "queue": ("", "config record slurm store"),
    "ranks": ("", "config full record run store submit sweep where worker"),
    "worker": ("", "compose config full queue ranks record run slurm store submit sweep tune where words"),
    "launch": ("", "config store sweep"),
    "plain": ("", ""),
    "status": ("", "config plain record slurm store submit sweep"),
    "tend": ("", "config plain slurm status store submit sweep"),
    "plan": (
        "",
        "compose config matching plan provenance ranks record report run space store submit sweep where worker",
    ),
    "report": ("pandas matplotlib", "report config matching record space store sweep tune whole"),
    "check": ("torch", "check compose config mixers registry"),
    "match": ("torch", "capacity compose config match record registry tasks"),
    "recorded": ("", "compose config record registry space store"),
    "show": (
        "torch",
        "backbone compose config directions mixers provenance recorded registry report run store tasks weights where",
    ),
    "speed": (
        "torch",
        "backbone capacity compiling compose config layers match mixers provenance registry report run seeds shells "
        "speed store tasks train where whole",
    ),
    "words": ("", ""),
    "cli": (
        "",
        "check cluster compose config launch match merge plan provenance queue registry report run show space speed "
        "store submit status sweep tasks tend where words worker",
    ),
}
VERBS = "config compose registry"  # for tasks/verbs.py besides: `data fetch` goes from a task's name to what it needs


def room(path: Path) -> str:
    return path.relative_to(BENCH).parts[0].removesuffix(".py")


def imported(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(BENCH)))
def test_a_room_knows_only_what_it_may(path):
    libraries, rooms = MAY.get(room(path), ("", ""))
    rooms = f"{rooms} {VERBS}" if path.name == "verbs.py" else rooms
    names = imported(path)
    assert {n.split(".")[0] for n in names} & HEAVY <= set(libraries.split())
    inner = {n.split(".")[1] for n in names if n.startswith("bench.")} - {"Refusal", "NotInstalled"}
    assert inner <= set(rooms.split())


def test_only_the_training_room_imports_lightning():
    assert [p.name for p in FILES if {"lightning"} & {n.split(".")[0] for n in imported(p)}] == ["train.py"]


def test_a_mixer_imports_no_other_mixer():
    """What has a yaml is a mixer; the rest of the room (the seam, the shared scan) may be imported by all of it."""
    names = {path.stem for path in (ROOT / "configs" / "mixer").glob("*.yaml")}
    for path in (BENCH / "mixers").glob("*.py"):
        others = {name.split(".")[2] for name in imported(path) if name.startswith("bench.mixers.")}
        assert not others & names, path


@pytest.mark.parametrize(
    "module",
    [
        *("bench.cli", "bench.config", "bench.sweep", "bench.launch", "bench.store", "bench.submit"),
        *("bench.queue", "bench.where", "bench.report.verb"),
        *("bench.plan.verb", "bench.provenance", "bench.status", "bench.tend"),
    ],
)
def test_what_users_wait_for_does_not_load_torch(module):
    heavy = "('torch', 'lightning', 'hydra', 'optuna', 'submitit')"
    code = f"import {module}, sys; print(*(m for m in {heavy} if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_names_of_mixers_occur_only_in_their_own_files():
    names = {p.stem for p in (ROOT / "configs" / "mixer").glob("*.yaml")}
    names -= {"identity", "attention", "dense", "add", "mult"}  # also English words, and ways of shell.directions
    for path in FILES:
        if path.parent.name != "mixers" and path.name != "plots.py":  # colours are by name
            strings = {
                n.value
                for n in ast.walk(ast.parse(path.read_text()))
                if isinstance(n, ast.Constant) and isinstance(n.value, str)
            }
            assert not strings & names, path


def test_functions_fit_on_a_screen_and_files_in_a_drawer():
    lengths = []
    for path in FILES:
        text = path.read_text()
        assert text.count("\n") <= 350, path
        lengths += [n.end_lineno - n.lineno + 1 for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    assert sorted(lengths)[int(len(lengths) * 0.9)] <= 45 and max(lengths) <= 60


def test_every_file_says_what_it_is_for():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_no_settings_hide_in_code():
    """No catch-all arguments, and no defaults in constructors of what a yaml describes."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.args.kwarg is None, f"{path}: {node.name}"
                if path.parent.name in ("mixers", "tasks") and node.name == "__init__":
                    assert not node.args.defaults and not node.args.kw_defaults, f"{path}: {node.name}"
            if isinstance(node, ast.ClassDef) and node.name == "Args":
                assert all(field.value is None for field in node.body if isinstance(field, ast.AnnAssign)), path

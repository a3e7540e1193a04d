"""Every committed table is what `report` makes of the committed records, byte for byte, and so is every figure.

Figures are compared under the matplotlib that pyproject pins: another one may set a letter elsewhere.
"""

import importlib.metadata
import re
import shutil
import subprocess
import tomllib
from functools import lru_cache
from pathlib import Path

import pytest

from bench.compose import ROOT
from bench.report.length_plot import MEASURED
from bench.report.verb import report
from bench.store import Store
from bench.sweep import load

GIVEN = ("records.jsonl", "items.parquet", "README.md", "rerun.txt")  # what the report reads, and what others write


def committed(name: str) -> list[str]:
    """Folders of results/ with this file in git: what a user has made there of other runs is nobody's evidence yet."""
    command = ["git", "-C", ROOT, "ls-files", f":(glob)results/*/{name}"]
    found = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return sorted(Path(path).parent.name for path in found)


TABLES = committed("certificate.json")
DEV = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
(PINNED,) = (m[1] for m in map(re.compile(r"matplotlib==(.+)").fullmatch, DEV) if m)


@pytest.fixture(scope="module")
def rebuilt(tmp_path_factory):
    """Name of a table -> (what is committed, what the report makes now of committed runs alone), file by file."""
    folder = tmp_path_factory.mktemp("rebuilt")
    (folder / "results").mkdir()
    for name in committed("records.jsonl"):
        (folder / "results" / name).symlink_to(ROOT / "results" / name)

    @lru_cache
    def made(name: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
        home = ROOT / "results" / name
        html = (home / "page.html").exists()
        if (home / MEASURED).exists():
            shutil.copytree(home / MEASURED.parent, folder / name / MEASURED.parent)
        report(load(ROOT / "sweeps" / f"{name}.yaml"), Store(folder / "results"), folder / name, None, html)
        return files(home), files(folder / name)

    return made


def files(folder) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name not in GIVEN}


def differing(rebuilt, name: str, figures: bool) -> list[str]:
    here, there = rebuilt(name)
    names = [n for n in {**here, **there} if n.startswith(("figures/", "page.html")) == figures]  # the page holds them
    assert names
    return [n for n in names if here.get(n) != there.get(n)]


@pytest.mark.parametrize("name", TABLES)
def test_a_committed_table_is_what_its_records_give(name, rebuilt):
    cure = f"mixerbench report sweeps/{name}.yaml and commit what it writes"
    assert differing(rebuilt, name, figures=False) == [], cure


@pytest.mark.parametrize("name", TABLES)
def test_a_committed_figure_is_what_its_records_give(name, rebuilt):
    if importlib.metadata.version("matplotlib") != PINNED:
        pytest.skip(f"figures are compared under matplotlib {PINNED}")
    assert differing(rebuilt, name, figures=True) == []

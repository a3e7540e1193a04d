"""README holds: its mixer is the example's, its sweep a committed one that says what the text says of it, its file map
and its commands name what is there."""

import dataclasses
import re
import subprocess
from pathlib import Path

from bench.compose import ROOT
from bench.registry import check, require_metrics
from bench.sweep import Departure, Family, Sweep, arms, grid, load

README = (ROOT / "README.md").read_text()
MIXER, SWEEP = "Add a mixer in five minutes", "Write a sweep"


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def block(language: str, title: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", section(title), re.DOTALL)
    return text


def test_the_mixer_of_the_readme_is_the_examples_word_for_word():
    example = ROOT / "examples" / "window"
    assert block("python", MIXER) == (example / "src" / "mixerbench_window" / "window.py").read_text()
    yaml = example / "src" / "mixerbench_window" / "configs" / "mixer" / "window.yaml"
    assert block("yaml", MIXER) == yaml.read_text()
    assert (example / "pyproject.toml").read_text().endswith("\n\n" + block("toml", MIXER))


def test_the_sweep_of_the_readme_is_a_committed_one_with_every_key_and_each_is_told():
    path, text = ROOT / "sweeps" / "quick_rank.yaml", section(SWEEP)
    assert block("yaml", SWEEP) == path.read_text()
    asked, told = load(path), text.split("```")[-1]
    keys = [f.name for kind in (Sweep, Family, Departure) for f in dataclasses.fields(kind)]
    assert [key for key in keys if f"`{key}`" not in told] == []
    assert all(getattr(asked, f.name) for f in dataclasses.fields(Sweep))
    runs = grid(asked)
    require_metrics([(column.protocol, column.metric) for column in asked.columns], runs)
    assert {check(run) for run in runs} == {""} and f"Cost: {len(runs)} runs" in path.read_text()
    assert len([arm for arm in arms(asked) if arm.mixer == "low_rank"]) == 4 and "`low_rank` is four arms" in told
    assert f"`{asked.family.primary.protocol}`" in told


def test_the_copy_with_few_steps_is_the_same_sweep(tmp_path):
    (command,) = re.findall(r"^    (sed .*) > /tmp/try.yaml$", section(SWEEP), re.MULTILINE)
    path = tmp_path / "try.yaml"
    path.write_bytes(subprocess.run(command, shell=True, cwd=ROOT, check=True, capture_output=True).stdout)
    few, whole = grid(load(path)), grid(load(ROOT / "sweeps" / "quick_rank.yaml"))
    assert len(few) == len(whole) and not {run.id for run in few} & {run.id for run in whole}
    assert max(run.protocol.budget.steps for run in few) == 4


def test_the_file_map_names_every_file_of_the_package_and_no_other():
    block = README.split("## Files\n\n")[1].split("\n\n")[0]
    named = set(re.findall(r"\b(\w+\.py)\b", block))
    there = {p.name for p in (ROOT / "bench").glob("*.py")} - {"__init__.py"}
    assert there <= named
    assert named <= {p.name for p in (ROOT / "bench").rglob("*.py")}


def test_make_targets_and_sweeps_that_the_readme_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
    for sweep in re.findall(r"sweeps/\w+\.yaml", README):
        assert (ROOT / sweep).exists()


def test_every_verb_of_the_readme_is_a_verb():
    from bench.words import parser

    known = parser().format_help()
    for verb in set(re.findall(r"^    mixerbench (\w+)", README, re.MULTILINE)):
        assert f"    {verb} " in known


def test_nothing_in_the_readme_points_outside_the_checkout():
    assert not [
        link
        for link in re.findall(r"\]\((.*?)\)", README)
        if not link.startswith("http") and not Path(ROOT / link).exists()
    ]

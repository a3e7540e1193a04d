"""README holds: its mixer is the example's, its file map and its commands name what is there."""

import re
from pathlib import Path

from bench.compose import ROOT

README = (ROOT / "README.md").read_text()


def block(language: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return text


def test_the_mixer_of_the_readme_is_the_examples_word_for_word():
    example = ROOT / "examples" / "window"
    assert block("python") == (example / "src" / "mixerbench_window" / "window.py").read_text()
    assert block("yaml") == (example / "src" / "mixerbench_window" / "configs" / "mixer" / "window.yaml").read_text()
    assert (example / "pyproject.toml").read_text().endswith("\n\n" + block("toml"))


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

"""README holds: its mixer works as printed, its file map and its commands name what is there."""

import re
from pathlib import Path

import torch

import bench.mixers
from bench import registry
from bench.compose import ROOT
from bench.mixers.base import Features, Grant

README = (ROOT / "README.md").read_text()


def test_the_mixer_of_the_readme_works_as_printed(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "window.py").write_text(code)
    monkeypatch.setattr(bench.mixers, "__path__", [*bench.mixers.__path__, str(tmp_path)])
    cls = registry.mixer_class("window")
    mixer = cls(Grant(heads=2, head_width=3, length=8, packed=False), cls.Args(sam=False, heads=2, reach=1), "torch")
    v_BLHP = torch.ones(1, 8, 2, 3)
    segments_BL = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    y_BLHP = mixer(v_BLHP, Features(*[v_BLHP[..., 0, :0]] * 3), segments_BL)
    expected = torch.tensor([2, 3, 3, 3, 2, 0, 0, 0]) / 3
    torch.testing.assert_close(y_BLHP, expected[None, :, None, None].expand_as(y_BLHP))


def test_the_yaml_of_the_readme_has_the_keys_of_its_args():
    (text,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    keys = re.findall(r"^(\w+):", text, re.MULTILINE)
    assert keys == ["name", *re.findall(r"^    (\w+): (?:bool|int)$", code, re.MULTILINE)]


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
    from bench.cli import parser

    known = parser().format_help()
    for verb in set(re.findall(r"^    mixerbench (\w+)", README, re.MULTILINE)):
        assert f"    {verb} " in known


def test_nothing_in_the_readme_points_outside_the_checkout():
    assert not [
        link
        for link in re.findall(r"\]\((.*?)\)", README)
        if not link.startswith("http") and not Path(ROOT / link).exists()
    ]

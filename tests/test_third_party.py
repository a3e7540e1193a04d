"""A mixer of another distribution: the installed example goes through every verb; a wrong claim is named when used."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from bench import Refusal, cli, compose, plugins, provenance, registry
from bench.check import verb
from bench.compose import ROOT
from bench.match.verb import match
from bench.mixers.base import Features, Grant
from bench.record import read_records
from bench.report import frame
from tests.conftest import forget as forget_composed

EXAMPLE = ROOT / "examples" / "window"
SOURCE = (EXAMPLE / "src" / "mixerbench_window" / "window.py").read_text()
YAML = (EXAMPLE / "src" / "mixerbench_window" / "configs" / "mixer" / "window.yaml").read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the example as pip installs it, built from a copy: a build leaves files beside its source."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(EXAMPLE, folder / "source")
    words = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *words, "--target", folder / "site", folder / "source"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "site"


def mixerbench(site: Path, *words: str, before: str = "pass") -> subprocess.CompletedProcess:
    """The command in a process of its own that finds `site`; `before` runs there first."""
    paths = os.pathsep.join(map(str, (ROOT, site)))
    code = f"import sys; {before}; from bench.cli import main; sys.exit(main())"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def swept(site, tmp_path_factory) -> tuple[Path, Path]:
    """A sweep of the example beside shipped mixers, trained by a worker: its file and its results."""
    folder = tmp_path_factory.mktemp("swept")
    values = {
        "question": "Does a window help recall?",
        "protocols": ["quick_recall"],
        "mixers": [{"name": "window", "reach": [1, 2]}, {"name": "low_rank"}],
        "seeds": [0],
        "replicas": [0],
        "varies": {"budget.steps": [2]},
        "departures": [],
        "columns": [{"protocol": "quick_recall", "metric": "accuracy"}],
        "family": {
            "reference": {"name": "low_rank"},
            "comparisons": ["reference"],
            "primary": {"protocol": "quick_recall", "metric": "accuracy"},
            "margin": 0.02,
            "alpha": 0.05,
        },
    }
    path = folder / "windows.yaml"
    path.write_text(yaml.safe_dump(values))
    done = mixerbench(site, "sweep", str(path), "where.device=cpu", f"where.results={folder / 'results'}")
    assert done.returncode == 0, done.stdout + done.stderr
    return path, folder / "results"


def test_the_installed_example_passes_the_conformance_suite(site):
    done = mixerbench(site, "check", "window")
    assert done.returncode == 0 and "; 0 fail" in done.stdout, done.stdout + done.stderr


def test_a_run_is_in_the_sweep_too_and_its_record_says_whose_code_made_it(site, swept):
    _, results = swept
    words = ["protocol=quick_recall", "mixer=window", "mixer.reach=1", "protocol.budget.steps=2"]
    done = mixerbench(site, "run", *words, "where.device=cpu", f"where.results={results}")
    assert done.returncode == 0 and "in the store already" in done.stdout, done.stdout + done.stderr
    records = [json.loads(path.read_text()) for path in (results / "runs").glob("*/record.json")]
    of = {(r["run"]["mixer"]["name"], r["run"]["mixer"].get("reach")): r for r in records}
    window, low_rank = of["window", 1], of["low_rank", None]
    module = "mixers/mixerbench-window/mixerbench_window"
    assert window["outcome"] == "ok"
    assert set(window["digests"]) - set(low_rank["digests"]) == {module, f"{module}/window"}
    assert window["digests"][f"{module}/window"] == provenance._digest(SOURCE.encode())
    own = {"mixers/low_rank", *(f"kernels/{name}" for name in ("low_rank", "scan", "scan_gradients", "scan_tiles"))}
    assert set(low_rank["digests"]) - set(window["digests"]) == own
    assert window["environment"]["packages"] == low_rank["environment"]["packages"] | {"mixerbench-window": "0.1.0"}


def test_the_report_has_both_and_loads_neither_torch_nor_the_mixer(site, swept):
    path, results = swept
    before = "import atexit; atexit.register(lambda: print('loaded:', *sorted(sys.modules)))"
    done = mixerbench(site, "report", str(path), f"where.results={results}", before=before)
    assert done.returncode == 0, done.stderr
    assert "| window   | no  |     1 |" in done.stdout and "| low_rank | yes |     - |" in done.stdout
    assert "mixerbench-window 0.1.0" in done.stdout
    loaded = done.stdout.split("loaded:")[1].split()
    assert "bench.report.frame" in loaded
    assert not [m for m in loaded if m.split(".")[0] in ("torch", "mixerbench_window")]


# Within this process -------------------------------------------------------------------------------------------------


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(distribution, entry points, files, version): a folder like pip's on the path of this process."""
    before = set(sys.modules)

    def forget() -> None:
        plugins.claims.cache_clear()
        forget_composed()

    def add(distribution: str, points: dict[str, str], files: dict[str, str], release: str = "1.0") -> Path:
        site = tmp_path / distribution
        about = site / f"{distribution.replace('-', '_')}-{release}.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {release}\n")
        lines = "".join(f"{name} = {value}\n" for name, value in points.items())
        (about / "entry_points.txt").write_text(f"[{plugins.GROUP}]\n{lines}")
        for name, text in files.items():
            (site / name).parent.mkdir(parents=True, exist_ok=True)
            (site / name).write_text(text)
        monkeypatch.setattr(sys, "path", [str(site), *sys.path])
        forget()
        return site

    yield add
    forget()
    for module in set(sys.modules) - before:  # each test's packages bear the same names
        if module.split(".")[0] == "sliding":
            del sys.modules[module]


def package(**changes: str | None) -> dict[str, str]:
    """Files of the package `sliding` with the mixer `slide`; `changes` replaces or (None) removes some."""
    files = {
        "init": ("sliding/__init__.py", '"""Sliding."""\n'),
        "module": ("sliding/slide.py", SOURCE),
        "yaml": ("sliding/configs/mixer/slide.yaml", YAML.replace("name: window", "name: slide")),
        "part": ("sliding/parts/reach.py", "REACH = 1\n"),
    }
    given = {path: changes.get(key, text) for key, (path, text) in files.items()}
    return {path: text for path, text in given.items() if text is not None}


def test_the_mean_of_a_window_is_what_the_example_computes(install):
    install("slides", {"slide": "sliding.slide"}, package())
    cls = registry.mixer_class("slide")
    mixer = cls(Grant(heads=2, head_width=3, length=8, packed=False), cls.Args(sam=False, heads=2, reach=1), "torch")
    v_BLHP = torch.ones(1, 8, 2, 3)
    segments_BL = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    y_BLHP = mixer(v_BLHP, Features(*[v_BLHP[..., 0, :0]] * 3), segments_BL)
    expected = torch.tensor([2, 3, 3, 3, 2, 0, 0, 0]) / 3
    torch.testing.assert_close(y_BLHP, expected[None, :, None, None].expand_as(y_BLHP))


def test_names_and_values_are_found_without_importing_the_package(install):
    install("slides", {"slide": "sliding.slide"}, package(init="raise SystemExit\n"))
    assert "slide" in compose.choices("mixer") and "slide" not in compose.shipped("mixer")
    assert "slide" not in compose.choices("protocol")
    assert compose.compose_group("mixer", "slide") == {"name": "slide", "sam": False, "heads": 4, "reach": 2}
    assert "sliding" not in sys.modules


def test_a_yaml_may_build_on_another_of_its_package(install):
    files = package(yaml="defaults:\n  - base\n  - _self_\nname: slide\n")
    install("slides", {"slide": "sliding.slide"}, files | {"sliding/configs/mixer/base.yaml": YAML})
    assert compose.compose_group("mixer", "slide") == {"name": "slide", "sam": False, "heads": 4, "reach": 2}


BROKEN = {
    "no such module": ({"module": None}, "there is no such module"),
    "no class": (
        {"module": '"""Nothing."""\n'},
        "must define one concrete subclass of bench.mixers.base.Mixer, found 0",
    ),
    "a method less": ({"module": SOURCE.replace("def flops", "def flop")}, "found 0: Window lacks flops"),
    "two classes": ({"module": SOURCE + "\n\nclass Twice(Window):\n    pass\n"}, "found 2: Twice; Window"),
    "no levels": ({"module": SOURCE.replace("levels: ClassVar", "stages: ClassVar")}, "Window must set levels"),
    "no heads": ({"module": SOURCE.replace("    heads: int\n", "")}, "Args must have the key 'heads: int'"),
    "sam of another type": ({"module": SOURCE.replace("sam: bool", "sam: str")}, "must have the key 'sam: bool'"),
    "plain Args": ({"module": SOURCE.replace("@dataclass(frozen=True)", "")}, "Args must be a dataclass"),
    "bad import": ({"module": SOURCE.replace("import torch", "import torhc")}, "No module named 'torhc'"),
    "bad syntax": ({"module": "def\n"}, "SyntaxError"),
    "no yaml": ({"yaml": None}, "slide.yaml"),
    "another name": ({"yaml": YAML}, "must say 'name: slide'"),
    "interpolation in defaults": ({"yaml": "defaults:\n  - ${oc.env:HOME}\n" + YAML}, "interpolation"),
    "interpolation": ({"yaml": YAML + "at: ${oc.env:HOME}\n"}, "interpolation"),
    "foreign key": ({"yaml": YAML.replace("name: window", "name: slide") + "hop: 1\n"}, "unknown key 'mixer.hop'"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_mixer_is_refused_in_one_line_when_it_is_used(install, fault):
    changes, message = BROKEN[fault]
    install("slides", {"slide": "sliding.slide"}, package(**changes))
    with pytest.raises(Refusal) as caught:
        registry.check(compose.make_run("quick_recall", "slide", {}, 0, 0))
    assert message in str(caught.value) and "\n" not in str(caught.value)
    if fault not in ("interpolation in defaults", "interpolation", "foreign key"):  # these name the file or the key
        assert "mixer 'slide' of slides 1.0 (sliding.slide): " in str(caught.value)


@pytest.mark.parametrize("fault", ["no such module", "bad syntax", "no yaml", "no heads", "plain Args"])
def test_a_broken_mixer_keeps_no_process_from_starting_and_no_other_from_its_check(install, monkeypatch, capsys, fault):
    changes, message = BROKEN[fault]
    install("slides", {"slide": "sliding.slide"}, package(**changes))
    assert str(ROOT / "bench" / "run.py") in provenance._found_at_start()
    monkeypatch.setattr(verb, "choices", lambda group: ["dft", "identity", "slide"])
    monkeypatch.setattr(verb, "check_mixer", lambda make, declared, full, device: [])
    assert verb.check("all", [], False, False) == 1
    shown = capsys.readouterr().out
    assert "dft sam=false" in shown and "identity sam=false" in shown
    assert message in shown and shown.count("  fail  ") == 1


def test_a_mixer_that_cannot_be_built_is_a_note_in_the_table_of_all_and_an_error_where_it_is_named(install, capsys):
    broken = SOURCE.replace("        self.args = args\n", "        raise TypeError('no such knob')\n")
    install("slides", {"slide": "sliding.slide"}, package(module=broken))
    message = "mixer 'slide' cannot be built and counted: TypeError: no such knob"
    assert match(["protocol=quick_recall"], "", "", "", "", None, True) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["slide"]["note"] == message and rows["slide"]["capacity"] is None
    assert rows["dft"]["capacity"]["parameters"] > 0
    with pytest.raises(Refusal, match=message):
        match(["protocol=quick_recall", "slide"], "", "", "", "", None, True)


@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"slide": "sliding.slide:Window"}, "the entry point must be 'slide = package.module'"),
        ({"slide": "nowhere.slide"}, "no such module"),
        ({"../slide": "sliding.slide"}, "a mixer's name is made of"),
    ],
)
def test_an_entry_point_that_names_no_mixers_module_is_refused(install, point, message):
    install("slides", point, package())
    (name,) = point
    with pytest.raises(Refusal, match=message):
        compose.compose_group("mixer", name)
    with pytest.raises(Refusal, match=message):
        registry.mixer_class(name)


def test_a_name_that_two_claim_is_refused_and_both_are_named(install, monkeypatch, capsys):
    install("slides", {"slide": "sliding.slide", "dense": "sliding.slide"}, package())
    install("glides", {"slide": "gliding.slide"}, {}, release="2.1")
    both = r"'slide' is claimed by glides 2.1 \(gliding.slide\) and slides 1.0 \(sliding.slide\)"
    for use in (registry.mixer_class, lambda name: compose.compose_group("mixer", name)):
        with pytest.raises(Refusal, match=both):
            use("slide")
        with pytest.raises(Refusal, match=r"'dense' is claimed by the shipped mixers .* and slides 1.0"):
            use("dense")
    assert registry.mixer_class("identity")
    monkeypatch.setattr(sys, "argv", ["mixerbench", "run", "protocol=quick_recall", "mixer=slide"])
    assert cli.main() == 2
    assert capsys.readouterr().err.count("\n") == 1


def digested(mixer: str):
    return compose.make_run("quick_recall", mixer, {}, 0, 0)


def test_digests_follow_the_packages_own_imports_and_the_guard_sees_an_edit(install, monkeypatch):
    absolute, relative = "from sliding.parts.reach import REACH\n", "from .parts import reach\n"
    keys = {f"mixers/slides/sliding{rest}" for rest in ("", "/slide", "/parts/reach")}
    for line in (absolute, relative):
        site = install(f"slides{len(line)}", {"slide": "sliding.slide"}, package(module=SOURCE + line))
        found = provenance.code_digests(digested("slide"))
        assert {k.replace(site.name, "slides") for k in found if k.startswith("mixers/slides")} == keys
        assert "mixers/base" in found and "mixers/dense" not in found
        monkeypatch.setattr(provenance, "LOADED", provenance._found_at_start())
        (site / "sliding" / "parts" / "reach.py").write_text("REACH = 2\n")
        with pytest.raises(Refusal, match=r"reach.py has changed since this process loaded it"):
            provenance.code_digests(digested("slide"))
        provenance.code_digests(digested("low_rank"))  # not its file
        monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(site)])


def test_the_gate_takes_a_mixers_own_package_for_the_mixers_and_every_other_for_shared():
    path = next((ROOT / "results").glob("*/records.jsonl"))
    record = next(iter(read_records(path).values()))
    own = {"mixers/slides/sliding/slide": "0" * 16}
    packages = {**record.environment.packages, "slides": "1.0"}
    brought = dataclasses.replace(
        record,
        digests=record.digests | own,
        environment=dataclasses.replace(record.environment, packages=packages),
    )
    assert frame.shared_code(brought) == frame.shared_code(record)
    assert frame.shared_packages(brought) == frame.shared_packages(record) == record.environment.packages


def test_shipped_mixers_have_records_as_before(install):
    before = provenance.code_digests(digested("dense"))
    install("slides", {"slide": "sliding.slide"}, package())
    assert provenance.code_digests(digested("dense")) == before
    assert {k for k in before if k.startswith("mixers/")} == {"mixers/base", "mixers/dense"}
    run, where = compose.parse_run(["protocol=quick_recall", "mixer=dense"])
    assert tuple(provenance.environment(run, where, "cpu", False, "torch").packages) == provenance.PACKAGES

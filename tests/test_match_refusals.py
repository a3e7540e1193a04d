"""What `mixerbench match` refuses: one line names the wrong thing and lists the right ones, and nothing is written."""

import sys

import pytest

from bench import cli

SMALL = "quick_recall"


@pytest.fixture
def call(monkeypatch, capsys):
    """(exit code, stdout, stderr) of `mixerbench match` with these words, without any data."""
    monkeypatch.delenv("MIXERBENCH_DATA", raising=False)

    def called(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mixerbench", "match", *map(str, words)])
        capsys.readouterr()
        code = cli.main()
        return code, *capsys.readouterr()

    return called


BAD = {
    "no protocol": (["low_rank"], ["protocol=…", "quick_recall"]),
    "unknown protocol": (["protocol=quick"], ["'quick'", "quick_recall"]),
    "unknown mixer": ([f"protocol={SMALL}", "mamba"], ["mamba", "low_rank"]),
    "unknown mixer to be like": ([f"protocol={SMALL}", "--like", "mamba"], ["mamba", "low_rank"]),
    "a mixer's key": ([f"protocol={SMALL}", "low_rank mixer.state=3"], ["mixer.state", "rank"]),
    "a key that none has": (
        [f"protocol={SMALL}", "low_rank", "cauchy", "mixer.state=3"],
        ["unknown key 'mixer.state': 'state' is not one of: sam, heads, rank, feature_map, normalise, bound\n"],
    ),
    "a key of all misspelt": ([f"protocol={SMALL}", "mixer.haeds=3"], ["'haeds' is not one of: sam, heads, ", " rank"]),
    "no key but a value's": ([f"protocol={SMALL}", "dense", "mixer.heads.x=3"], ["mixer.heads.x", "'x'"]),
    "a protocol's key": ([f"protocol={SMALL}", "protocol.shell.expnd=3"], ["expnd", "expand"]),
    "a run's word": ([f"protocol={SMALL}", "mixer=low_rank"], ["'mixer'", "names"]),
    "an empty list": ([f"protocol={SMALL}", "low_rank mixer.rank=[]"], ["mixer.rank", "empty"]),
    "refused by all": ([f"protocol={SMALL}", "protocol.budget.batch=0"], ["protocol.budget.batch", "at least 1"]),
    "unknown budget": ([f"protocol={SMALL}", "--budget", "memory=3"], ["memory", "parameters=…", "state=…"]),
    "budget without a number": ([f"protocol={SMALL}", "--budget", "flops"], ["flops", "number above 0"]),
    "budget of nothing": ([f"protocol={SMALL}", "--budget", "flops=0"], ["flops", "above 0"]),
    "budget that is no number": ([f"protocol={SMALL}", "--budget", "flops=nan"], ["flops", "nan"]),
    "impossible budget": ([f"protocol={SMALL}", "--budget", "parameters=100"], ["impossible", "without any mixer"]),
    "two budgets": ([f"protocol={SMALL}", "--budget", "flops=1e6", "--like", "dense"], ["--budget", "--like"]),
    "like what grows": ([f"protocol={SMALL}", "--like", "dense", "--by", "state"], ["dense", "state", "grows"]),
    "like nothing": ([f"protocol={SMALL}", "--like", "identity"], ["identity", "mixer_parameters", "0"]),
    "unknown figure": ([f"protocol={SMALL}", "--like", "dense", "--by", "memory"], ["memory", "flops"]),
    "a figure of no one": ([f"protocol={SMALL}", "--by", "flops"], ["--by", "--like"]),
    "unknown knob": ([f"protocol={SMALL}", "--like", "dense", "--knob", "width"], ["width", "heads, hidden, inner"]),
    "a knob for no budget": ([f"protocol={SMALL}", "--knob", "rank"], ["--knob", "--like"]),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_line_and_nothing_is_written(call, tmp_path, case):
    words, parts = BAD[case]
    out = ("--out", tmp_path / "out") if {"--budget", "--like"} & set(words) else ()
    code, said, err = call(*words, *out)
    assert (code, said, err.count("\n")) == (2, "", 1) and err.startswith("mixerbench: ")
    assert all(part in err for part in parts), err
    assert not (tmp_path / "out").exists()


def test_the_keys_that_are_listed_are_those_that_run_lists(call, monkeypatch, capsys):
    code, out, said = call(f"protocol={SMALL}", "quasiseparable", "mixer.haeds=12")
    monkeypatch.setattr(
        sys, "argv", ["mixerbench", "run", f"protocol={SMALL}", "mixer=quasiseparable", "mixer.haeds=12"]
    )
    assert (code, out, cli.main()) == (2, "", 2)
    assert said == capsys.readouterr().err.replace("name, ", "")  # which mixers they are, `match` has said by words


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_where_the_folder_should_be_is_refused_before_anything_is_counted(call, tmp_path, monkeypatch, below):
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("bench.match.verb.table", None)
    code, out, err = call(f"protocol={SMALL}", "--budget", "state=128", "--out", tmp_path / "file" / below)
    assert (code, out) == (2, "")
    assert err.endswith(f"{tmp_path / 'file'} is a file; name a folder, which need not be there yet\n")
    assert err.count("\n") == 1 and (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["file", "n" * 300])
def test_a_folder_that_cannot_be_made_for_its_name_is_one_line(capsys, tmp_path, name):
    (tmp_path / "file").touch()
    assert cli.guarded(lambda path: path.mkdir(), tmp_path / name) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"mixerbench: {tmp_path / name}: File ") and said.count("\n") == 1

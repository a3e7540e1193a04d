"""Ids, strict build, refusal of interpolations; golden text of one resolved protocol."""

import json
from pathlib import Path

import pytest

from bench import Refusal, compose, config
from bench.compose import make_run, parse_overrides, parse_run
from bench.config import digest, resolved
from tests.conftest import forget

GOLDEN = Path(__file__).parent / "golden"


def test_resolved_protocol_is_the_golden_text():
    text = json.dumps(resolved(make_run("mini_mrpc", "low_rank", {}, 0, 0)), indent=1, sort_keys=True) + "\n"
    assert text == (GOLDEN / "mini_mrpc.json").read_text()


def test_an_id_depends_on_values_and_not_on_how_they_are_written():
    plain = make_run("quick_digits", "low_rank", {"mixer.rank": 16}, 0, 0)
    assert plain.id == make_run("quick_digits", "low_rank", {"mixer.rank": 16.0}, 0, 0).id
    assert plain.id == make_run("quick_digits", "low_rank", parse_overrides(["mixer.rank=1.6e1"]), 0, 0).id
    assert digest({"a": True}) != digest({"a": 1})
    assert plain.id != make_run("quick_digits", "low_rank", {"mixer.rank": 8}, 0, 0).id


def test_every_key_of_a_run_is_in_its_id():
    base = make_run("quick_digits", "low_rank", {}, 0, 0)
    seen = {base.id}
    for key, value in _leaves(resolved(base)["protocol"], "protocol"):
        if key in ("protocol.init", "protocol.task.name"):
            continue
        other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else 0.123
        if isinstance(value, str):
            other = {
                "pre": "post",
                "mean": "first",
                "linear": "cosine",
                "fp32": "bf16",
                "one": "concat",
                "gated": "plain",
            }[value]
        if key.endswith("betas"):
            other = [0.5, 0.5]
        if key.endswith("conv_width"):
            other = 9
        if key.endswith("expand"):
            other = 1.5
        seen.add(make_run("quick_digits", "low_rank", {key: other}, 0, 0).id)
    leaves = len(list(_leaves(resolved(base)["protocol"], "protocol"))) - 2
    assert len(seen) == leaves + 1


def _leaves(node, path):
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}.{key}")
        else:
            yield f"{path}.{key}", value


def test_a_later_key_at_its_neutral_value_keeps_old_ids(monkeypatch):
    old = {"protocol": {"steps": 1}}
    monkeypatch.setattr(config, "NEUTRAL", {"protocol.novelty": 0})
    assert digest({"protocol": {"steps": 1, "novelty": 0}}) == digest(old)
    assert digest({"protocol": {"steps": 1, "novelty": 1}}) != digest(old)
    assert digest({"protocol": {"steps": 1}, "novelty": 0}) != digest(old)  # the path counts, not the name


def test_where_is_not_in_the_id():
    here, _ = parse_run(["protocol=quick_digits", "mixer=dense", "where.threads=1"])
    there, where = parse_run(["protocol=quick_digits", "mixer=dense", "where.threads=7", "where.data=/elsewhere"])
    assert here.id == there.id and where.threads == 7


def test_a_child_takes_backbone_changes_up_its_chain_and_nothing_else():
    plain = make_run("mini_mrpc", "low_rank", {}, 3, 2)
    wide = make_run("mini_mrpc", "low_rank", {"protocol.backbone.width": 128, "protocol.budget.steps": 5}, 3, 2)
    top = wide.parent.parent
    assert (top.protocol.backbone.width, top.protocol.budget.steps) == (128, plain.parent.parent.protocol.budget.steps)
    assert (wide.parent.seed, wide.parent.replica, wide.replica) == (3, 0, 2)
    assert wide.protocol.init == wide.parent.protocol_id != plain.protocol.init


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["protocol=quick_digits", "mixer=nonsense"], "unknown mixer 'nonsense'; known: add, attention"),
        (["protocol=quick_digit", "mixer=dense"], "unknown protocol 'quick_digit'; known: "),
        (["protocol=quick_digits"], "missing 'mixer=…'; known: add, attention"),
        (
            ["protocol=quick_digits", "mixer=dense", "protocol.budget.stepz=3"],
            "unknown key 'protocol.budget.stepz': 'stepz' is not one of: steps, batch",
        ),
        (
            ["protocol=quick_digits", "mixer=dense", "mixer.rank=3"],
            "unknown key 'mixer.rank': 'rank' is not one of: name, sam, heads",
        ),
        (
            ["protocol=quick_digits", "mixer=dense", "protocol.budget.steps=many"],
            "protocol.budget.steps must be of type int, got 'many' (str)",
        ),
        (
            ["protocol=quick_digits", "mixer=dense", "protocol.budget.steps=true"],
            "protocol.budget.steps must be of type int, got True (bool)",
        ),
        (
            ["protocol=quick_digits", "mixer=dense", "protocol.budget.steps=-5"],
            "protocol.budget.steps must be at least 1, got -5",
        ),
        (
            ["protocol=quick_digits", "mixer=dense", "protocol.budget.steps=2.5"],
            "protocol.budget.steps must be of type int, got 2.5 (float)",
        ),
        (["protocol=quick_digits", "mixer=dense", "seed=-1"], "run.seed must be at least 0"),
        (["protocol=quick_digits", "mixer=dense", "replica=1"], "replica 1: protocol 'quick_digits' has no parent"),
        (["protocol=quick_digits", "mixer=dense", "nonsense=1"], "unknown key 'nonsense'"),
        (["protocol=quick_digits", "mixer=dense", "where.speed=1"], "unknown key 'where.speed'"),
        (["protocol=quick_digits", "mixer=dense", "where.data=${oc.env:HOME}"], "interpolation"),
        (["protocol=quick_digits", "mixer=dense", "+a=1"], "only plain key=value is allowed"),
        (["protocol=quick_digits", "mixer=dense", "seed=0,1"], "only plain key=value is allowed"),
        (
            ["protocol=quick_digits", "mixer=dense", "protocol.precision=fp64"],
            "protocol.precision must be one of fp32, bf16, got 'fp64'",
        ),
        (["protocol=quick_digits", "mixer=dense", "seed=0", "seed=1"], "each key once"),
        (["protocol=quick_digits", "mixer=dense", "protocol.budget.steps@here=7"], "only plain key=value is allowed"),
        (["protocol=quick_digits", "mixer=dense", "protocol.optimiser.lr=nan"], "lr must be a finite number, got nan"),
        (["protocol=quick_digits", "mixer=dense", "protocol.optimiser.lr=inf"], "lr must be a finite number, got inf"),
        (["protocol=quick_digits", "mixer=dense", "protocol.optimiser.betas=[1.5,0.9]"], "betas must lie from 0"),
        (["protocol=quick_digits", "mixer=dense", "protocol.backbone.drop_path=1.0"], "drop_path must lie from 0"),
        (["protocol=quick_digits", "mixer=dense", "protocol.backbone.init_std=-1"], "init_std must be at least 0"),
        (["protocol=quick_digits", "mixer=dense", "protocol.backbone.norm_eps=-1"], "norm_eps must be at least"),
        (["protocol=quick_digits", "mixer=dense", "protocol.backbone={layers:2}"], "is a group of keys; change one of"),
        (["protocol=quick_digits", "mixer=dense", "protocol.shell.conv_width=4"], "conv_width must be odd"),
        (
            ["protocol=quick_recall", "mixer=dense", "protocol.shell.expand=1.3"],
            "protocol.shell.expand x protocol.backbone.width must be a whole number, got 1.3 x 32 = 41.6",
        ),
        (
            ["protocol=quick_digits", "mixer=dense", "protocol.shell.directions=both"],
            "protocol.shell.directions must be one of one, concat, add, mult, got 'both'",
        ),
    ],
)
def test_a_wrong_word_is_refused_in_one_line_that_names_it(words, message):
    with pytest.raises(Refusal) as caught:
        parse_run(words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def written(tmp_path, monkeypatch, **protocols) -> None:
    """Configs of protocols given as text, beside the shipped tasks and mixers."""
    for group in ("task", "mixer"):
        (tmp_path / group).symlink_to(compose.CONFIGS / group)
    (tmp_path / "run.yaml").write_text((compose.CONFIGS / "run.yaml").read_text())
    (tmp_path / "protocol").mkdir()
    for name, text in protocols.items():
        (tmp_path / "protocol" / f"{name}.yaml").write_text(text)
    monkeypatch.setattr(compose, "CONFIGS", tmp_path)
    forget()


BASE = (compose.CONFIGS / "protocol" / "quick_digits.yaml").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# nothing\n", "missing key 'protocol.task.name'"),
        ("- a\n", "must hold key: value lines"),
        ("a: 1\n", "missing key 'protocol.task.name'"),
        (BASE.replace('init: ""\n', ""), "missing key 'protocol.init'"),
        (BASE.replace('init: ""', "init: p"), "starts from itself"),
        (BASE.replace('init: ""', "init: nowhere"), "unknown protocol 'nowhere'"),
    ],
)
def test_a_protocol_file_that_is_not_whole_is_refused_in_one_line(tmp_path, monkeypatch, text, message):
    written(tmp_path, monkeypatch, p=text)
    with pytest.raises(Refusal) as caught:
        make_run("p", "dense", {}, 0, 0)
    forget()
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("norm: pre", "norm: post", "backbone.norm"),
        ("skip: true", "skip: false", "shell.skip"),
        ("conv_causal: false", "conv_causal: true", "shell.conv_causal"),
    ],
)
def test_a_child_that_would_read_its_parents_weights_otherwise_is_refused(tmp_path, monkeypatch, old, new, key):
    child = BASE.replace('init: ""', "init: p")
    written(
        tmp_path, monkeypatch, p=BASE, same=child.replace("dropout: 0.0", "dropout: 0.1"), other=child.replace(old, new)
    )
    assert make_run("same", "dense", {}, 0, 0).parent.label == "p"
    with pytest.raises(Refusal, match=rf"'other' cannot start from 'p': {key}="):
        make_run("other", "dense", {}, 0, 0)
    forget()


@pytest.mark.parametrize("place", ["value", "key", "defaults", "task"])
def test_an_interpolation_in_a_yaml_is_refused_before_it_is_resolved(tmp_path, monkeypatch, place):
    text = {
        "value": "a: ${oc.env:HOME}\n",
        "key": "${oc.env:HOME}: 1\n",
        "defaults": "defaults:\n  - ${oc.env:HOME}\n",
        "task": "defaults:\n  - /task@task: evil\n  - _self_\n",
    }[place]
    for group in ("protocol", "task", "mixer"):
        (tmp_path / group).mkdir()
    (tmp_path / "run.yaml").write_text("defaults:\n  - protocol: null\n  - _self_\n")
    (tmp_path / "protocol" / "p.yaml").write_text(text)
    (tmp_path / "task" / "evil.yaml").write_text("name: ${oc.env:HOME}\n")
    monkeypatch.setattr(compose, "CONFIGS", tmp_path)
    forget()
    with pytest.raises(Refusal, match="interpolation"):
        compose.compose_group("protocol", "p")
    forget()


@pytest.mark.parametrize("text", ["a: !!python/object/apply:os.system ['true']\n", "a: [1\n", "a: 1\na: 2\n"])
def test_yaml_that_is_unsafe_broken_or_repeats_a_key_is_refused(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(Refusal, match="is not readable yaml") as caught:
        compose.load_yaml(path)
    assert "\n" not in str(caught.value)

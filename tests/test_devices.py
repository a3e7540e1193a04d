"""The benchmark of one training on one device and on several: what it compares, and when it fails."""

import dataclasses
import json

import pytest

from bench import Refusal
from bench.compose import make_run
from bench.config import resolved
from bench.store import Store
from benchmarks import devices
from tests.test_store import a_record

RUN = make_run("quick_recall", "low_rank", {"protocol.budget.steps": 4}, 0, 0)
VALUES = json.loads(json.dumps(resolved(RUN)))
WORDS = ["--devices", "2", "--mixers", "low_rank", "--protocol", "quick_recall", "protocol.budget.steps=4"]


class Ended:
    def wait(self) -> int:
        return 0


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """The exit status where the three trainings leave these losses; in `asked` what each was told."""

    def main(losses: dict[str, list[float]]) -> int:
        def train(words, mixer, count, parts, gpus, folder):
            asked.append((folder.name, count, parts, gpus))
            if folder.name in losses:
                record = a_record(0, accuracy=1.0)
                cost = dataclasses.replace(record.cost, step_p50=SECONDS[folder.name])
                curve = tuple(enumerate(losses[folder.name], 1))
                own = {"id": RUN.id, "label": RUN.label, "protocol_id": RUN.protocol_id, "run": VALUES}
                Store(folder).finish(dataclasses.replace(record, **own, cost=cost, curve=curve), {})
            return Ended()

        asked.clear()
        monkeypatch.setattr(devices, "train", train)
        return devices.main([*WORDS, "--out", str(tmp_path)])

    asked = main.asked = []
    return main


SECONDS = {"one": 0.2, "again": 0.2, "several": 0.1}
LOSSES = {"one": [4.0, 3.0, 2.0, 1.0], "again": [4.0, 3.0, 2.0, 1.5], "several": [4.0, 3.0, 2.0005, 1.25]}


def test_the_same_batch_is_taken_in_parts_by_one_device_and_at_once_by_several(trained, tmp_path):
    assert trained(LOSSES) == 0
    assert trained.asked == [("one", 1, 2, "0"), ("again", 1, 2, "1"), ("several", 2, 1, "0,1")]
    (row,) = json.loads((tmp_path / "devices.json").read_text())
    assert row["itself"] == {"first": 0.0, "all": 0.5} and row["speedup"] == pytest.approx(2)
    assert row["devices"] == {"first": pytest.approx(0.0005), "all": 0.25}


def test_several_devices_whose_first_losses_are_others_fail(trained):
    assert trained(LOSSES | {"several": [4.0, 3.1, 2.0, 1.0]}) == 1


def test_a_training_that_left_no_record_is_named(trained):
    with pytest.raises(Refusal, match=r"low_rank: no record that is ok of several \(exit codes \[0, 0, 0\]\)"):
        trained({name: LOSSES[name] for name in ("one", "again")})

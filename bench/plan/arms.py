"""The arms of several sweeps by what a training step of theirs does, for whoever tries each but once."""

import itertools
from dataclasses import dataclass
from pathlib import Path

from bench.config import Run
from bench.sweep import cells, load


@dataclass(frozen=True)
class Arm:
    """`run` is tried; it stands for `alike`, itself included, which cost the same but for steps and evaluation."""

    name: str
    run: Run
    alike: list[Run]


def arms(groups: list[list[Path]]) -> list[Arm]:
    """Every protocol and mixer once: in each group the pretrainings, then the fine-tunings, a sweep's arm in turn.

    So whoever stops half way has tried something of every sweep of a group.
    """
    known: dict[tuple, Arm] = {}
    ordered: list[Arm] = []
    for group in groups:
        each = [_new(path, known) for path in group]
        for child in (False, True):
            kind = [[arm for arm in new if (arm.run.parent is not None) == child] for new in each]
            ordered += [arm for turn in itertools.zip_longest(*kind) for arm in turn if arm]
    return ordered


def _new(path: Path, known: dict[tuple, Arm]) -> list[Arm]:
    """Those of a sweep that stand for themselves; the others are added to the known arm that they are like."""
    found, seen = [], {(r.protocol_id, r.mixer.canonical) for arm in known.values() for r in arm.alike}
    for cell in cells(load(path)):
        run = cell.run
        pair = run.protocol_id, run.mixer.canonical
        if cell.seed or cell.replica or pair in seen:
            continue
        seen.add(pair)
        if (key := _work(run)) in known:
            known[key].alike.append(run)
            continue
        own = " ".join(f"{k.removeprefix('mixer.')}={v}" for k, v in cell.arm.changes.items())
        known[key] = Arm(f"{path.stem} {cell.protocol} {cell.arm.mixer} {own}", run, [run])
        found.append(known[key])
    return found


def _work(run: Run) -> tuple:
    """What a training step does. Pretrainings are all different, even where only a constant is."""
    p = run.protocol
    if run.parent is None:
        return run.protocol_id, run.mixer.canonical
    return run.mixer.canonical, str(p.backbone), str(p.shell), p.precision, p.budget.batch, p.task.args["length"]

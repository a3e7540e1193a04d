"""Why a run is new: which fields of its id differ from the nearest finished run of the same mixer name.

Nearest is by the number of differing fields of the whole configuration, written flat (`protocol.optimiser.lr`); a field
that is not there in an older record has its neutral value. Runs with the same difference are one line.
"""

from dataclasses import dataclass

from bench.config import NEUTRAL, Run, resolved
from bench.plan.evidence import Ledger
from bench.plan.graph import Node
from bench.space import SELECTED

ABSENT = "absent"
SHOWN = 3  # differing fields that a line spells out


@dataclass(frozen=True)
class Reason:
    """What sets some runs apart; '' fields where there is nothing to compare with."""

    text: str
    fields: tuple[str, ...]
    runs: int
    protocols: tuple[str, ...]
    mixers: tuple[str, ...]
    nearest: str  # id of one such finished run


def reasons(nodes: list[Node], ledger: Ledger) -> list[Reason]:
    """One for each distinct difference among the missing runs, in the sweep's order."""
    nearest = Nearest(ledger)
    groups: dict[tuple, list[tuple[Run, str]]] = {}
    for node in nodes:
        if node.state == "missing":
            tuning = "a tuning trial that was not run", ("point",), ""
            text, fields, found = tuning if node.run.is_trial else nearest.of(node.run)
            groups.setdefault((text, fields), []).append((node.run, found))
    return [
        Reason(
            text=text,
            fields=fields,
            runs=len(members),
            protocols=tuple(dict.fromkeys(r.label for r, _ in members)),
            mixers=tuple(dict.fromkeys(r.mixer.name for r, _ in members)),
            nearest=members[0][1],
        )
        for (text, fields), members in groups.items()
    ]


class Nearest:
    """The finished runs by mixer name, protocol and arguments, and what has been compared already."""

    def __init__(self, ledger: Ledger):
        self.protocols = {key: flat(values, "protocol") for key, values in ledger.protocols.items()}
        self.mixers = {key: flat(values, "mixer") for key, values in ledger.mixers.items()}
        self.finished: dict[str, dict[tuple[str, str], dict[tuple[int, int], str]]] = {}
        shown = [f for f in ledger.finished.values() if f.kind in ("", SELECTED)]
        for f in sorted(shown, key=lambda f: (f.seed, f.replica, f.id)):
            name = ledger.mixers[f.mixer]["name"]
            group = self.finished.setdefault(name, {}).setdefault((f.protocol_id, f.mixer), {})
            group[f.seed, f.replica] = f.id
        self.between: dict[tuple[str, str], dict] = {}
        self.ranked: dict[tuple[str, str], list] = {}

    def of(self, run: Run) -> tuple[str, tuple[str, ...], str]:
        """(what differs, in words; the differing fields; the nearest finished run's id)."""
        best = None
        for differing, ids in self._ranked(run):
            if best is not None and len(differing) >= best[0]:
                break  # the rest differs in more
            beside, there = self._beside(run, ids)
            if best is None or len(differing) + len(beside) < best[0]:
                best = len(differing) + len(beside), differing, beside, there
        if best is None:
            return "no finished run of the mixer", (), ""
        _, differing, beside, there = best
        fields = (*sorted(differing), *beside)
        if "protocol.task.name" in differing:  # then nearly every field differs, and none of them is the reason
            return f"no finished run of the mixer on task {run.protocol.task.name}", ("protocol.task.name",), ""
        return _words(differing, beside), fields, there

    def _ranked(self, run: Run) -> list:
        """(differing fields, finished ids) for each protocol and mixer of that name that has finished runs."""
        key = run.protocol_id, run.mixer.canonical
        if key not in self.ranked:
            found = []
            for (protocol, mixer), ids in self.finished.get(run.mixer.name, {}).items():
                held = self._differing(protocol, self.protocols, run.protocol_id, run, "protocol")
                own = self._differing(mixer, self.mixers, run.mixer.canonical, run, "mixer")
                found.append((held | own, ids))
            self.ranked[key] = sorted(found, key=lambda pair: len(pair[0]))
        return self.ranked[key]

    def _differing(self, old: str, known: dict, new: str, run: Run, part: str) -> dict[str, tuple]:
        """Field -> (old value, new value)."""
        if old == new:
            return {}
        if (old, new) not in self.between:
            before, after = known[old], known[new] if new in known else flat(resolved(run)[part], part)
            known.setdefault(new, after)
            every = {k: (before.get(k, ABSENT), after.get(k, ABSENT)) for k in before | after}
            self.between[old, new] = {k: pair for k, pair in every.items() if pair[0] != pair[1]}
        return self.between[old, new]

    @staticmethod
    def _beside(run: Run, ids: dict[tuple[int, int], str]) -> tuple[dict[str, tuple], str]:
        """Whether seed or replica differ from every finished run of one protocol and mixer: ({field: values}, id)."""
        if (run.seed, run.replica) in ids:
            return {}, ids[run.seed, run.replica]
        same_seed = [found for (seed, _), found in ids.items() if seed == run.seed]
        if same_seed:
            return {"replica": (_numbers(r for s, r in ids if s == run.seed), run.replica)}, same_seed[0]
        seeds = _numbers(seed for seed, _ in ids)
        first = min(ids)
        fields = {"seed": (seeds, run.seed)} | ({} if first[1] == run.replica else {"replica": (first[1], run.replica)})
        return fields, ids[first]


def flat(values: dict, path: str) -> dict[str, object]:
    """Nested values as 'protocol.task.length': value, with neutral values left out, as in the id."""
    found: dict[str, object] = {}
    for key, value in values.items():
        below = f"{path}.{key}"
        if isinstance(value, dict) and value:
            found |= flat(value, below)
        elif below not in NEUTRAL or NEUTRAL[below] != value:
            found[below] = list(value) if isinstance(value, tuple) else value
    return found


def _words(differing: dict[str, tuple], beside: dict[str, tuple]) -> str:
    """'protocol.budget.steps 400 -> 800, …'; of a run that starts from another parent it says just that."""
    others = sorted(k for k in differing if k != "protocol.init")
    words = [f"{k} {_value(differing[k][0], k)} -> {_value(differing[k][1], k)}" for k in others[:SHOWN]]
    if len(others) > SHOWN:
        words.append(f"{len(others) - SHOWN} more fields")
    if "protocol.init" in differing:
        words.append("starts from another parent (protocol.init)")
    if "seed" in beside:
        words.append(f"another seed (finished: {beside['seed'][0]})")
    if "replica" in beside:
        words.append(f"another replica (finished: {beside['replica'][0]})")
    return ", ".join(words)


def _value(value, key: str) -> str:
    """Short: what is not there or left out takes the neutral value's place; a checksum its first digits."""
    if value == ABSENT and key in NEUTRAL:
        value = NEUTRAL[key]
    text = value if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else f"{value}"
    text = "''" if text == "" else text
    return text if len(text) <= 24 else text[:12] + "…"


def _numbers(numbers) -> str:
    """'0-2, 5'."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{low}-{high}" if high > low else f"{low}" for low, high in runs)

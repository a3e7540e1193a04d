"""What the page knows of each run: its record in compact form, equal parts stored once. Plain values, ready for JSON.

A run is a list in the order of FIELDS; those in POOLED are places in `pool`. Nothing here is markup: the page shows
every text as text.
"""

import json
import math

import yaml

from bench.report.analysis import Analysis
from bench.report.frame import LEVELS, Arm, Table, plain
from bench.report.plots import arm_looks
from bench.report.stats_tests import t_interval
from bench.report.suite import subset_of
from bench.report.tables import column_title

FIELDS = (
    *("id", "arm", "protocol", "seed", "replica", "outcome", "reason", "config", "metrics", "cost", "capacity", "gain"),
    *("environment", "digests", "hashes", "steps", "losses", "protocol_id", "registration", "finished"),
)
POOLED = ("outcome", "reason", "capacity", "environment", "digests", "hashes", "steps", "protocol_id", "registration")
CONFIG = ("mixer", "seed", "replica", "point", "protocol")  # what differs inside a column comes first
INK = "#000000"
DIGITS = 4  # of losses and seconds; records hold them in full


class Pool:
    """Values that several runs share, each once; runs hold their places."""

    def __init__(self):
        self.values: list = []
        self.places: dict[str, int] = {}

    def place(self, value) -> int:
        key = repr(value)  # equal values that are written differently stand twice, no harm
        if key not in self.places:
            self.places[key] = len(self.values)
            self.values.append(value)
        return self.places[key]


class Writer(yaml.SafeDumper):
    """Lists on one line, mappings below each other."""


def one_line(writer: Writer, value: list):
    return writer.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)


Writer.add_representer(list, one_line)
Writer.add_representer(tuple, one_line)


def island(table: Table, analysis: Analysis) -> dict:
    """Arms, columns and runs of a table."""
    pool, labels = Pool(), {p: i for i, p in enumerate(table.protocols())}
    arms, configs = {a.key: i for i, a in enumerate(table.arms)}, {}
    runs = []
    for row in table.rows:
        values = run_values(row.record) | {"arm": arms[row.arm], "protocol": labels[row.protocol]}
        values |= {"seed": row.seed, "replica": row.replica, "config": config_places(row.record.run, pool, configs)}
        runs.append([pool.place(values[k]) if k in POOLED else values[k] for k in FIELDS])
    return {
        "arms": [arm_values(table, arm, look.colour) for arm, look in zip(table.arms, arm_looks(table), strict=True)],
        "axes": axes(table),
        "protocols": list(labels),
        "columns": columns(table, analysis, labels),
        "fields": FIELDS,
        "pooled": POOLED,
        "pool": pool.values,
        "runs": runs,
    }


def arm_values(table: Table, arm: Arm, colour: str) -> dict:
    """`keys`: what the filter offers, one text for each of `axes`. Black ink is white on a dark page."""
    keys = [arm.mixer["name"], LEVELS[arm.mixer["sam"]].cell]
    keys += [plain(arm.mixer[k]) if k in arm.mixer else "-" for k in table.axes]
    colour = "currentColor" if colour == INK else colour
    failed = any(r.record.outcome != "ok" for r in table.rows if r.arm == arm.key)
    return {"label": arm.label, "colour": colour, "sam": arm.mixer["sam"], "keys": keys, "failed": failed}


def axes(table: Table) -> list[str]:
    return ["mixer", "SAM", *table.axes]


def columns(table: Table, analysis: Analysis, labels: dict[str, int]) -> list[dict]:
    """Title, `parts` (protocol's place and metric: several for an average), means and t intervals over the seeds."""
    found = []
    for measured in analysis.measured:
        mean_A, low_A, high_A = t_interval(measured.values_AS, 1 - analysis.alpha)
        ends = [[finite(float(v)) for v in values] for values in (mean_A, low_A, high_A)]
        parts = [[labels[measured.column.protocol], measured.column.metric]] if measured.column in table.columns else []
        if not parts:
            tasks = analysis.average.tasks
            parts = [[labels[c.protocol], c.metric] for c in table.columns if subset_of(table.of(c.protocol)) in tasks]
        title = column_title(measured.column)
        found.append({"title": title, "parts": parts, "mean": ends[0], "low": ends[1], "high": ends[2]})
    return found


def config_places(run: dict, pool: Pool, known: dict[str, int]) -> list[int]:
    """The resolved run as yaml, one text a top-level key."""
    found = []
    for key in (*CONFIG, *(k for k in run if k not in CONFIG)):
        if key in run:
            name = repr((key, run[key]))
            if name not in known:
                text = yaml.dump({key: run[key]}, Dumper=Writer, allow_unicode=True, width=100)
                known[name] = pool.place(text)
            found.append(known[name])
    return found


def run_values(record) -> dict:
    return {
        "id": record.id,
        "outcome": record.outcome,
        "reason": record.reason,
        "metrics": {k: finite(v) for k, v in sorted(record.metrics.items())},
        "cost": {k: v if isinstance(v, int) else rounded(v) for k, v in vars(record.cost).items()},
        "capacity": vars(record.capacity),
        "gain": [rounded(v) for v in record.gain],
        "environment": vars(record.environment),
        "digests": dict(sorted(record.digests.items())),
        "hashes": vars(record.hashes),
        "steps": [step for step, _ in record.curve],
        "losses": [rounded(loss) for _, loss in record.curve],
        "protocol_id": record.protocol_id,
        "registration": record.registration,
        "finished": record.finished,
    }


def rounded(value: float) -> float | None:
    """To DIGITS significant digits; None for what is not finite, which JSON does not have."""
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def dump(values: dict) -> str:
    """JSON that may stand inside a <script> element: no '<', '>' or '&', nothing beyond ASCII."""
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")

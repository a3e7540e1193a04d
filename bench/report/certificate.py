"""The fairness certificate: what was equal for all arms of each column, what was declared to differ, what it ran on.

certificate.json has it in full, run by run; a few lines of it stand under the table.
"""

import json
from dataclasses import asdict

from bench.config import digest
from bench.report.frame import Arm, Row, Table, facts, flattened, plain, protocol_value, same, shared_code
from bench.report.tables import CAPACITY

RAN_ON = ("torch", "python", "device", "precision", "backend", "compiled", "threads", "world", "micro_batches")


def certificate(table: Table) -> dict:
    """Plain values. Holds no date and no machine's name, so that the same records give the same file."""
    sweep = table.sweep
    return {
        "sweep": sweep.name,
        "question": sweep.question,
        "columns": [asdict(c) for c in table.columns],
        "seeds": list(table.seeds),
        "arms": {a.label: {"mixer": a.mixer, "departed": a.departed, "sources": list(a.sources)} for a in table.arms},
        "varies": sweep.varies,
        "declared": declared(table),
        "protocols": {protocol: of_protocol(table, protocol) for protocol in table.protocols()},
        "ran_on": ran_on(table.rows),
        "records": len(table.rows),
        "notes": list(table.notes),
    }


def declared(table: Table) -> dict:
    """What the sweep says now that the report tests, its hash, and how many records ran under each declaration."""
    carried = [r.record.registration or "none" for r in table.rows]
    counts = {name: carried.count(name) for name in sorted(set(carried))}
    controls = {"controls": list(table.sweep.controls)} if table.sweep.controls else {}
    return {"family": asdict(table.sweep.family), **controls, "hash": table.sweep.registration, "records": counts}


def of_protocol(table: Table, protocol: str) -> dict:
    """The protocol that the arms share, the declared differences from it, and what each block agreed on."""
    rows, arms = table.of(protocol), {a.key: a for a in table.arms}
    # The arms with the fewest departures: those without any, unless every arm has one.
    base = min(rows, key=lambda r: len(arms[r.arm].departed))
    blocks = [
        block([r for r in rows if (r.seed, r.replica) == place], arms)
        for place in dict.fromkeys((r.seed, r.replica) for r in rows)
    ]
    return {
        "id": protocol_id(base),
        "config": base.record.run["protocol"],
        "departed": {arms[r.arm].label: difference(base, r) for r in rows if r.shared != base.shared},
        "capacity": capacity(rows),
        "blocks": blocks,
    }


def protocol_id(row: Row) -> str:
    return digest({"protocol": row.record.run["protocol"]})


def difference(base: Row, row: Row) -> dict:
    """The departed protocol's id, and key -> [value of the shared protocol, value of this arm]."""
    shared, own = base.record.run["protocol"], row.record.run["protocol"]
    keys = dict.fromkeys([*flattened(shared), *flattened(own)])
    pairs = {k: [protocol_value(r.record.run, k) for r in (base, row)] for k in keys}
    return {"id": protocol_id(row), "differs": {k: v for k, v in pairs.items() if not same(*v)}}


def block(rows: list[Row], arms: dict[str, Arm]) -> dict:
    """One seed and replica: what its arms agree on, and for each arm what is its own."""
    trained = sorted((r for r in rows if r.trained), key=lambda r: len(arms[r.arm].departed))
    agreed: dict[str, str] = {}
    for row in trained:
        agreed = {f: v for (f, _), v in facts(row).items()} | agreed
    own = {}
    for row in rows:
        record, shared = row.record, shared_code(row.record)
        own[arms[row.arm].label] = {
            "run": row.run_id,
            "outcome": record.outcome,
            "trained": row.trained,
            "reason": record.reason,
            "code": {k: v for k, v in record.digests.items() if k not in shared},
            "differs": {f: v for (f, _), v in facts(row).items() if row.trained and v != agreed[f]},
            "capacity": asdict(record.capacity),
            "gain": list(record.gain),
            **({"chosen": row.point} if row.point else {}),
        }
    return {"seed": rows[0].seed, "replica": rows[0].replica, "agreed": agreed, "arms": own}


def capacity(rows: list[Row]) -> dict[str, list[int]]:
    """Least and greatest over all arms; a state that grows with the length stands as -1."""
    found = {key: [getattr(r.record.capacity, key) for r in rows if r.trained] for key in CAPACITY}
    return {key: [min(values), max(values)] for key, values in found.items() if values}


def ran_on(rows: tuple[Row, ...]) -> dict[str, list]:
    """Every distinct value of each setting and library version."""
    found: dict[str, dict] = {}
    for row in rows:
        if row.trained:
            values = {key: getattr(row.record.environment, key) for key in RAN_ON} | row.record.environment.packages
            for key, value in values.items():
                found.setdefault(key, {})[value] = None
    return {key: list(values) for key, values in found.items()}


def dump(proof: dict) -> str:
    return json.dumps(proof, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


# Short form ---------------------------------------------------------------------------------------------------------


def short(proof: dict) -> list[str]:
    """Lines for the foot of the table."""
    lines = [protocol_line(protocol, values) for protocol, values in proof["protocols"].items()]
    ran = {k: ", ".join(plain(v) or "none" for v in values) for k, values in proof["ran_on"].items()}
    lines.append("Ran on: " + "; ".join(f"{k.replace('_', ' ')} {v}" for k, v in ran.items()) + ".")
    declared = []
    for label, arm in proof["arms"].items():
        if arm["departed"]:
            changed = ", ".join(f"{k} = {plain(v)}" for k, v in arm["departed"].items())
            declared.append(f"{label}: {changed} ({'; '.join(arm['sources'])})")
    lines.append(f"Departures: {' | '.join(declared) or 'none'}.")
    varies = [f"{k} in {', '.join(plain(v) for v in values)}" for k, values in proof["varies"].items()]
    lines.append(f"Varies, for every arm alike: {'; '.join(varies) or 'nothing'}.")
    family, counts = proof["declared"]["family"], proof["declared"]["records"]
    carried = ", ".join(f"{n} records ran under `{name}`".replace("`none`", "none") for name, n in counts.items())
    primary = " x ".join(family["primary"].values())
    lines.append(f"Declared: primary {primary}, margin {family['margin']:g}, `{proof['declared']['hash']}`; {carried}.")
    return lines


def protocol_line(protocol: str, values: dict) -> str:
    departed = "".join(f", {label} `{d['id']}`" for label, d in values["departed"].items())
    facts = [equal(fact, values["blocks"]) for fact in ("shared initialisation", "batches", "optimiser groups")]
    ranges = ", ".join(span(k, *v) for k, v in values["capacity"].items())
    return f"`{protocol}`: protocol `{values['id']}`{departed}; {'; '.join(facts)}; {ranges}."


def equal(fact: str, blocks: list[dict]) -> str:
    """'batches `1f…` (seed 0), `2e…` (seed 1), equal for all arms but dense'."""
    several = len({b["replica"] for b in blocks}) > 1
    places: dict[str, list[str]] = {}
    for one in blocks:
        if fact in one["agreed"]:
            name = f"{one['seed']}.{one['replica']}" if several else str(one["seed"])
            places.setdefault(one["agreed"][fact], []).append(name)
    unit = "seed.replica" if several else "seed"
    units = {value: unit + "s" * (len(names) > 1) for value, names in places.items()}
    hashes = ", ".join(f"`{value}` ({units[value]} {', '.join(names)})" for value, names in places.items())
    odd = dict.fromkeys(label for b in blocks for label, arm in b["arms"].items() if fact in arm["differs"])
    idle = dict.fromkeys(label for b in blocks for label, arm in b["arms"].items() if not arm["trained"])
    tuned = any("chosen" in arm for b in blocks for arm in b["arms"].values())
    why = "departure or tuned value" if tuned else "departure"
    who = "all arms" + f" but {', '.join(odd)} ({why})" * bool(odd)
    return f"{fact} {hashes}, equal for {who}" + f" (not trained: {', '.join(idle)})" * bool(idle)


def span(name: str, low: int, high: int) -> str:
    if low < 0:  # stands for a state that grows with the length
        text = "growing with length" if high < 0 else f"up to {high:,} or growing with length"
    else:
        text = f"{low:,}" if low == high else f"{low:,} to {high:,}"
    return f"{name.replace('_', ' ')} {text}"

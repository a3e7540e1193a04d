"""`mixerbench check`: which mixers a word means, the table, and the row that only `all` has.

A name has its yaml's values, at every level of `sam` and in every form that its class names (misaligned, which is a
permutation before the mixer, in the first form only), unless the command line sets more than `sam`; module:Class has
the values of the command line.
"""

import dataclasses
import importlib
import itertools
import json
import math
import sys
import time
from functools import partial

import torch

from bench import Refusal
from bench.check import Declared, Row, check_mixer, subject_of
from bench.check.misaligned import Misaligned
from bench.check.subject import WIDTH, documents, pushed
from bench.compose import choices, compose_group, make_where, parse_overrides
from bench.config import MISALIGNED, Where, build, listed
from bench.mixers.base import Grant, Mixer
from bench.registry import aligned, backend, mixer_class, whole

ALL = "all"


def check(name: str, words: list[str], as_json: bool, full: bool) -> int:
    """Print one table (or JSON list) for each mixer that `name` means; 1 if any row fails, else 0."""
    torch.set_num_threads(
        1
    )  # the matrices are small: more threads cost more than they bring, above all on a shared core
    changes, where = split(words)
    makers = everything(changes, where) if name == ALL else of(name, changes, where)
    broken = unusable(where) if name == ALL else {}
    tables = {label: [Row("can be used", None, "fail", why)] for label, why in broken.items()}
    if not as_json:
        for label, rows in tables.items():
            show(label, rows, None)
    for label, (make, declared) in makers.items():
        start = time.perf_counter()
        tables[label] = check_mixer(make, declared, full, where.device)
        if not as_json:
            show(label, tables[label], time.perf_counter() - start)
    if name == ALL:
        tables[ALL] = [distinct(makers)]
        if not as_json:
            show(ALL, tables[ALL], None)
    failed = [row for rows in tables.values() for row in rows if row.verdict == "fail"]
    if as_json:
        print(json.dumps({label: [plain(row) for row in rows] for label, rows in tables.items()}, indent=1))
    else:
        print(f"mixers: {len(makers)}, rows: {sum(map(len, tables.values()))}; {len(failed)} fail")
    return int(bool(failed))


def split(words: list[str]) -> tuple[dict, Where]:
    """The mixer's own keys, and where to run: on the CPU if nothing is said, whatever the machine has."""
    given = parse_overrides(words)
    changes = {key: value for key, value in given.items() if not key.startswith("where.")}
    unknown = set(given) - set(changes) - {"where.device", "where.backend"}
    if unknown:
        raise Refusal(f"check does not take {listed(sorted(unknown))}; allowed: where.device, where.backend")
    where = make_where({"where.device": "cpu"} | {key: given[key] for key in given if key not in changes})
    if where.device == "auto":
        where = dataclasses.replace(where, device="cuda" if torch.cuda.is_available() else "cpu")
    if where.device == "cuda" and not torch.cuda.is_available():
        raise Refusal("where.device=cuda, but no CUDA device was found; use: cpu")
    return changes, where


def everything(changes: dict, where: Where) -> dict:
    if changes:
        raise Refusal(f"check all takes no keys of a mixer, got: {listed(changes)}")
    broken = unusable(where)
    names = [name for name in choices("mixer") if name not in broken]
    return {label: found for name in names for label, found in of(name, {}, where).items()}


def unusable(where: Where) -> dict[str, str]:
    """Name -> why the mixer cannot even be loaded: it is a failure of its own and keeps no other from its check."""
    found = {}
    for name in choices("mixer"):
        try:
            of(name, {}, where)
        except Refusal as error:
            found[name] = str(error)
    return found


def of(name: str, changes: dict, where: Where) -> dict:
    """Label -> (make, declared) for a name or module:Class, one for each level and form that is asked for.

    The first backend is the one under test in all rows; the others that `where` allows have rows of their own.
    """
    if ":" in name:
        cls, values = outside(name), {}
    else:
        if name not in choices("mixer"):
            raise Refusal(f"unknown mixer '{name}'; known: {listed([ALL, *choices('mixer')])}, or module:Class")
        cls, values = mixer_class(name), compose_group("mixer", name)
        values.pop("name")
    backend(cls, where.backend, where.device)  # refuses an unknown one, or one that the device cannot run
    found = {}
    forms = cls.forms if set(changes) <= {"sam"} else [{}]
    levels = [changes["sam"]] if "sam" in changes else cls.levels
    wanted, has = list(itertools.product(levels, forms)), (*cls.levels, *[MISALIGNED] * (True in cls.levels))
    if "sam" not in changes and True in cls.levels:
        wanted.append((MISALIGNED, forms[0]))
    for level, form in wanted:
        if level not in has:
            known = listed(f"sam={plain_word(level)}" for level in has)
            raise Refusal(f"mixer '{name}' has no form with sam={plain_word(level)}; it has: {known}")
        said = {**form, **changes, "sam": level}
        args = build(cls.Args, {**values, **aligned(said)}, "mixer")
        if args.heads not in cls.heads_allowed(args.heads * WIDTH):
            raise Refusal(f"mixer '{name}' does not allow heads={args.heads}")
        label = " ".join([name, *(f"{key}={plain_word(value)}" for key, value in ({"sam": level} | said).items())])
        found[label] = declared_by(cls, args, level != MISALIGNED, where)
    return found


def declared_by(cls: type[Mixer], args, is_aligned: bool, where: Where) -> tuple:
    """What makes the mixer, and what it declares."""
    made = {way: partial(make, cls, args, is_aligned, way) for way in cls.backends}
    asked = [way for way in cls.backends[1:] if where.backend in ("auto", way)]
    if where.backend != "auto":
        for way in asked:  # by name: one that is not installed is refused now, not skipped
            made[way](Grant(heads=args.heads, head_width=WIDTH, length=WIDTH, packed=False))
    others = tuple((way, made[way]) for way in asked)
    declared = Declared(args.sam, args.heads, partial(cls.unfit, args=args), others, is_aligned)
    return made[cls.backends[0]], declared


def plain_word(value) -> str:
    """A value as yaml writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def make(cls: type[Mixer], args, is_aligned: bool, way: str, grant: Grant) -> Mixer:
    """With the arguments' own number of heads, unless the grant is for another."""
    mixer = cls(grant, dataclasses.replace(args, heads=grant.heads), way)
    return mixer if is_aligned else Misaligned(mixer)


def outside(name: str) -> type[Mixer]:
    """The class of 'module:Class'; modules of the working directory are found too."""
    module, _, cls = name.partition(":")
    if not all(part.isidentifier() for part in module.split(".")):
        raise Refusal(f"'{module}' is no name of a module; wanted: package.module:Class")
    if "" not in sys.path:
        sys.path.append("")
    try:
        found = vars(importlib.import_module(module)).get(cls)
    except Exception as error:  # whatever keeps a module from loading is that module's fault
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise Refusal(f"cannot import '{module}': {why}") from None
    if not (isinstance(found, type) and issubclass(found, Mixer)):
        raise Refusal(f"'{cls}' of {module} is not a class of mixers (a subclass of bench.mixers.base.Mixer)")
    return whole(found)


def distinct(makers: dict) -> Row:
    """No two mixers apply the same matrix (up to one factor) to the same tokens from the same random numbers."""
    matrices = {}
    for label, (make, declared) in makers.items():
        subject = subject_of(make, declared, full=False)
        mixer, segments_1L = subject.mixer(16, False), documents([[16]], 16)
        matrices[label] = pushed(mixer, *subject.inputs(mixer, segments_1L), segments_1L)
    closest = min(itertools.combinations(matrices, 2), key=lambda pair: distance(*(matrices[x] for x in pair)))
    figure = distance(*(matrices[x] for x in closest))
    verdict = "pass" if figure > 1e-3 else "fail"
    return Row("no two give the same matrix", figure, verdict, f"distance of the closest pair: {' and '.join(closest)}")


def distance(m_HLL, n_HLL) -> float:
    """Between the heads that both have, each side scaled to norm 1, whatever its sign."""
    heads = min(len(m_HLL), len(n_HLL))
    m_HLL, n_HLL = (x[:heads] / x[:heads].norm() for x in (m_HLL, n_HLL))
    return float(min((m_HLL - n_HLL).norm(), (m_HLL + n_HLL).norm()))


def plain(row: Row) -> dict:
    """A row as JSON can hold it: a figure that is not finite as text."""
    finite = row.figure is None or math.isfinite(row.figure)
    return {**row._asdict(), "figure": row.figure if finite else str(row.figure)}


def show(label: str, rows: list[Row], seconds: float | None) -> None:
    print(label if seconds is None else f"{label}  ({seconds:.1f} s)")
    for row in rows:
        figure = "" if row.figure is None else f"{row.figure:.3g}"
        print(f"  {row.verdict:4}  {row.property:31} {figure:>9}  {row.note}")
    print(flush=True)

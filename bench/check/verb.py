"""`mixerbench check`: which mixers a word means, the table, and the row that only `all` has.

A name has its yaml's values, at every level of `sam` and in every form that its class names, unless the command line
sets more than `sam`; module:Class has the values of the command line.
"""

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
from bench.check.subject import WIDTH, documents, pushed
from bench.compose import choices, compose_group, parse_overrides
from bench.config import build, listed
from bench.mixers.base import Grant, Mixer
from bench.registry import mixer_class

ALL = "all"


def check(name: str, words: list[str], as_json: bool, full: bool) -> int:
    """Print one table (or JSON list) for each mixer that `name` means; 1 if any row fails, else 0."""
    torch.set_num_threads(
        1
    )  # the matrices are small: more threads cost more than they bring, above all on a shared core
    changes = parse_overrides(words)
    makers = everything(changes) if name == ALL else of(name, changes)
    broken = unusable() if name == ALL else {}
    tables = {label: [Row("can be used", None, "fail", why)] for label, why in broken.items()}
    if not as_json:
        for label, rows in tables.items():
            show(label, rows, None)
    for label, (make, declared) in makers.items():
        start = time.perf_counter()
        tables[label] = check_mixer(make, declared, full)
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


def everything(changes: dict) -> dict:
    if changes:
        raise Refusal(f"check all takes no key=value words, got: {listed(changes)}")
    broken = unusable()
    names = [name for name in choices("mixer") if name not in broken]
    return {label: found for name in names for label, found in of(name, {}).items()}


def unusable() -> dict[str, str]:
    """Name -> why the mixer cannot even be loaded: it is a failure of its own and keeps no other from its check."""
    found = {}
    for name in choices("mixer"):
        try:
            of(name, {})
        except Refusal as error:
            found[name] = str(error)
    return found


def of(name: str, changes: dict) -> dict:
    """Label -> (make, declared) for a name or module:Class, one for each level and form that is asked for."""
    if ":" in name:
        cls, values = outside(name), {}
    else:
        if name not in choices("mixer"):
            raise Refusal(f"unknown mixer '{name}'; known: {listed([ALL, *choices('mixer')])}, or module:Class")
        cls, values = mixer_class(name), compose_group("mixer", name)
        values.pop("name")
    found = {}
    levels = [changes["sam"]] if "sam" in changes else cls.levels
    for level, form in itertools.product(levels, cls.forms if set(changes) <= {"sam"} else [{}]):
        args = build(cls.Args, {**values, **form, **changes, "sam": level}, "mixer")
        if args.sam not in cls.levels:
            known = listed(f"sam={plain_word(level)}" for level in cls.levels)
            raise Refusal(f"mixer '{name}' has no form with sam={plain_word(args.sam)}; it has: {known}")
        if args.heads not in cls.heads_allowed(args.heads * WIDTH):
            raise Refusal(f"mixer '{name}' does not allow heads={args.heads}")
        made = partial(make, cls, args)
        said = {"sam": args.sam} | form | changes
        label = " ".join([name, *(f"{key}={plain_word(value)}" for key, value in said.items())])
        found[label] = (made, Declared(sam=args.sam, heads=args.heads))
    return found


def plain_word(value) -> str:
    """A value as yaml writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def make(cls: type[Mixer], args, grant: Grant) -> Mixer:
    return cls(grant, args, cls.backends[0])


def outside(name: str) -> type[Mixer]:
    """The class of 'module:Class'; modules of the working directory are found too."""
    module, _, cls = name.partition(":")
    if "" not in sys.path:
        sys.path.append("")
    try:
        found = vars(importlib.import_module(module)).get(cls)
    except ImportError as error:
        raise Refusal(f"cannot import '{module}': {error}") from None
    if not (isinstance(found, type) and issubclass(found, Mixer)):
        raise Refusal(f"'{cls}' of {module} is not a class of mixers (a subclass of bench.mixers.base.Mixer)")
    return found


def distinct(makers: dict) -> Row:
    """No two mixers apply the same matrix (up to one factor) to the same tokens from the same random numbers."""
    matrices = {}
    for label, (make, declared) in makers.items():
        subject = subject_of(make, declared, full=False)
        mixer, segments_1L = subject.mixer(16, False), documents([[16]], 16)
        m_LL = pushed(mixer, *subject.inputs(mixer, segments_1L), segments_1L)[0]
        matrices[label] = m_LL / m_LL.norm()
    closest = min(itertools.combinations(matrices, 2), key=lambda pair: distance(*(matrices[x] for x in pair)))
    figure = distance(*(matrices[x] for x in closest))
    verdict = "pass" if figure > 1e-3 else "fail"
    return Row("no two give the same matrix", figure, verdict, f"distance of the closest pair: {' and '.join(closest)}")


def distance(m_LL, n_LL) -> float:
    """Between matrices of norm 1, whatever their sign."""
    return float(min((m_LL - n_LL).norm(), (m_LL + n_LL).norm()))


def plain(row: Row) -> dict:
    """A row as JSON can hold it: a figure that is not finite as text."""
    finite = row.figure is None or math.isfinite(row.figure)
    return {**row._asdict(), "figure": row.figure if finite else str(row.figure)}


def show(label: str, rows: list[Row], seconds: float | None) -> None:
    print(label if seconds is None else f"{label}  ({seconds:.1f} s)")
    for row in rows:
        figure = "" if row.figure is None else f"{row.figure:.3g}"
        print(f"  {row.verdict:4}  {row.property:28} {figure:>9}  {row.note}")
    print(flush=True)

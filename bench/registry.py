"""Names -> classes. A mixer or a task is one file, named like it, with one `Args` dataclass and one concrete class.

The file system is the registry of what is shipped, the metadata of installed distributions (plugins.py) that of other
mixers: nothing else lists the names. Loading a class imports torch; config.py does not.
"""

import dataclasses
import importlib
import inspect
import types
from pathlib import Path

from bench import Refusal, kernels
from bench.compose import choices, claim_of
from bench.config import MISALIGNED, NEUTRAL, Run, build, listed, one_of
from bench.mixers.base import Grant, Mixer
from bench.plugins import Claim
from bench.seeds import Streams
from bench.shells.base import find
from bench.tasks.base import SELECTION, Places, Task


def mixer_class(name: str) -> type[Mixer]:
    """The class of a shipped mixer or of one that an installed distribution brings."""
    claim = claim_of(name)
    if claim is None:
        return _class_in(_module("mixers", name), Mixer)
    try:
        return _class_in(_brought(claim), Mixer)
    except Refusal as error:
        raise claim.broken(str(error)) from None


def task_class(name: str) -> type[Task]:
    return _class_in(_module("tasks", name), Task)


def _class_in(module: types.ModuleType, base: type) -> type:
    """The one concrete subclass of `base` that a module defines."""
    found = [
        c
        for _, c in inspect.getmembers(module, inspect.isclass)
        if issubclass(c, base) and c.__module__ == module.__name__ and not inspect.isabstract(c)
    ]
    if len(found) != 1:
        own = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
        lacks = [f"{c.__name__} lacks {', '.join(sorted(c.__abstractmethods__))}" for c in own if inspect.isabstract(c)]
        say = lacks if not found else [c.__name__ for c in found]
        raise Refusal(
            f"{module.__name__} must define one concrete subclass of {base.__module__}.{base.__name__}, "
            f"found {len(found)}{': ' * bool(say)}{'; '.join(say)}"
        )
    return whole(*found)


def whole(cls: type) -> type:
    """A mixer's or a task's class, unless it lacks what every one must set; a Refusal names it."""
    base, name = Mixer if issubclass(cls, Mixer) else Task, f"{cls.__module__}.{cls.__name__}"
    if missing := [key for key in inspect.get_annotations(base) if key not in dir(cls)]:
        raise Refusal(f"{name} must set {', '.join(missing)}")
    if not dataclasses.is_dataclass(cls.Args):
        raise Refusal(f"{name}.Args must be a dataclass")
    if base is Task:
        return cls
    types = {field.name: field.type for field in dataclasses.fields(cls.Args)}
    for key, kind in (("sam", bool), ("heads", int)):
        if types.get(key) not in (kind, kind.__name__):  # annotations may be postponed, as text
            raise Refusal(f"{name}.Args must have the key '{key}: {kind.__name__}'")
    return cls


def _brought(claim: Claim) -> types.ModuleType:
    """The module of another distribution's mixer; whatever keeps it from loading is that distribution's fault."""
    try:
        return importlib.import_module(claim.module)
    except Exception as error:
        trace = f"`python -c 'import {claim.module}'` shows where"
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise Refusal(f"its module does not load, {why}; {trace}") from None


def _module(room: str, name: str) -> types.ModuleType:
    path = f"bench.{room}.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name != path:
            raise
        raise Refusal(f"unknown {room.removesuffix('s')} '{name}'; known: {', '.join(choices(room[:-1]))}") from None


def make_task(run: Run, places: Places) -> Task:
    """The task of a run; of a tuned protocol with the selection's examples held out, for trials and reruns alike."""
    cls = task_class(run.protocol.task.name)
    task = cls(build(cls.Args, run.protocol.task.args, "protocol.task"), places)
    if run.protocol.tune:
        task.reserve(run.protocol.tune.selection.examples)
    return task


def require_metrics(columns: list[tuple[str, str]], runs: list[Run]) -> None:
    """Refuse a metric that no task of its protocol has: once a run is made, what was declared stands in its record."""
    known: dict[str, dict[str, None]] = {}  # of each protocol, whatever is varied in it
    for run in {run.label: run for run in runs}.values():
        task, has = make_task(run, Places(None, Path())), known.setdefault(run.label.split("[", 1)[0], {})
        own = [name for part in task.held_out() for name in task.names(part)]
        has |= dict.fromkeys([*own, *(f"ema_{name}" for name in own if run.protocol.optimiser.ema)])
        if run.protocol.tune:
            one_of("protocol.tune.selection.metric", run.protocol.tune.selection.metric, task.names(SELECTION))
    for protocol, metric in columns:
        has = known.get(name := protocol.split("[", 1)[0])
        if has and metric not in has:
            raise Refusal(f"column '{protocol} x {metric}': no metric '{metric}'; '{name}' has: {listed(has)}")


def mixer_args(run: Run):
    """The mixer's own arguments, strictly typed, with the levels and head counts that it allows checked.

    For `sam: misaligned` those of `sam: true`: that the features are another token's is for the shell (`order`).
    """
    cls, level = mixer_class(run.mixer.name), run.mixer.args.get("sam")
    none = f"mixer '{run.mixer.name}' has no form with sam={str(level).lower()}; it has: {_levels(cls)}"
    if isinstance(level, str) and level != MISALIGNED:
        raise Refusal(none)
    args = build(cls.Args, aligned(run.mixer.args), "mixer")
    if args.sam not in cls.levels:
        raise Refusal(none)
    inner = run.protocol.inner
    if args.heads not in cls.heads_allowed(inner):
        allowed = ", ".join(map(str, cls.heads_allowed(inner)))
        raise Refusal(
            f"mixer.heads={args.heads} does not fit '{run.mixer.name}' at inner width {inner}; allowed: {allowed}"
        )
    return args


def aligned(args: dict) -> dict:
    """A mixer's arguments as its class takes them, without salt: `sam: misaligned` is its `sam: true` form."""
    own = {key: value for key, value in args.items() if key != "salt"}
    return {**own, "sam": True} if own.get("sam") == MISALIGNED else own


def salt(run: Run) -> int:
    """Other than 0 for an A/A arm: the same mixer, with other draws of its own parameters."""
    return run.mixer.args.get("salt", NEUTRAL["mixer.salt"])


def _levels(cls: type[Mixer]) -> str:
    known = [str(level).lower() for level in cls.levels] + [MISALIGNED] * (True in cls.levels)
    return ", ".join(f"sam={level}" for level in known)


def order(run: Run) -> int | None:
    """What fixes which token's features each place gets, None for its own: a matter of the seed alone, so that replicas
    and children keep the order that their parent learnt with."""
    return Streams(run.seed, 0).torch_seed("order of features") if run.mixer.args["sam"] == MISALIGNED else None


def grant(run: Run, task: Task, args) -> Grant:
    spec = task.spec()
    return Grant(heads=args.heads, head_width=run.protocol.inner // args.heads, length=spec.length, packed=spec.packed)


def backend(cls: type[Mixer], asked: str, device: str) -> str:
    """The backend that a run computes with: for 'auto' the kernels on a CUDA device that has triton, else the mixer's
    plain one, which also stands in for one that it does not have, since a sweep sets one backend for all arms. Every
    arm has 'triton', if only in its shell. What the device cannot run is refused."""
    known = ("auto", "torch", "triton", "mamba_ssm")
    if asked not in known:
        raise Refusal(f"where.backend must be one of {', '.join(known)}, got {asked!r}")
    if asked in ("triton", "mamba_ssm") and device != "cuda":
        raise Refusal(f"where.backend={asked} needs a CUDA device; on {device} use: torch")
    if asked == "auto" and device == "cuda" and kernels.present():
        asked = "triton"
    return asked if asked in (*cls.backends, "triton") else cls.backends[0]


def check(run: Run) -> str:
    """Refuse a run whose keys are wrong; the reason why its mixer is unfit for the setting, '' if it is not."""
    args = mixer_args(run)
    find(run.protocol.shell)
    task = make_task(run, Places(data=None, cache=None))
    if run.protocol.budget.batch % task.spec().group:
        raise Refusal(
            f"protocol.budget.batch must be a multiple of {task.spec().group}, got {run.protocol.budget.batch}"
        )
    return mixer_class(run.mixer.name).unfit(grant(run, task, args), args) or unfit_beyond(run, task, args)


def unfit_beyond(run: Run, task: Task, args) -> str:
    """Why a mixer cannot read the longest rows that its task evaluates on; refuses positions that do not go so far."""
    own, longest = task.spec().length, task.longest()
    if longest <= own:
        return ""
    backbone = run.protocol.backbone
    if backbone.positions and (rows := backbone.position_rows or own) < longest:
        raise Refusal(
            f"the task also reads {longest} tokens, learned positions have {rows} rows; set "
            "protocol.backbone.positions=false"
        )
    return "" if args.sam else f"has a matrix for {own} tokens, the task also reads {longest}"

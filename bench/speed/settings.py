"""What is measured: configs/speed.yaml, changed by the command line. Everything a result depends on is in its JSON.

Arms are words as `match` takes them. A bare name stands for its lines of speed.yaml, whose keys any word overrides.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from bench import Refusal, registry
from bench.compose import CONFIGS, load_yaml, make_run, make_where, parse_overrides
from bench.config import Run, Where, at_least, build, listed, one_of
from bench.match.rows import Arm, keys_of, parse_arm, parse_words, runs_of, text_of
from bench.run import device_of

WAYS = ("fast", "eager", "graph", "naive")
SEGMENTS = ("full", "padded", "packed")
WHERE = ("device", "backend", "threads", "compile", "graph", "micro_batches", "results")
ALL = "all"
NO_LAYERS = {"lengths": (), "tokens": 0, "batch": 0, "ways": (), "segments": "", "seconds": 0.0}


@dataclass(frozen=True)
class OnDevice:
    set: dict  # changes of the protocol
    ways: tuple[str, ...]
    lengths: tuple[int, ...]
    tokens: int
    seconds: float
    copy: int
    matrix: int


@dataclass(frozen=True)
class Fits:
    steps: int
    stretch: int
    rounds: int


@dataclass(frozen=True)
class Defaults:
    """configs/speed.yaml, which says what each key means."""

    protocol: str
    segments: str
    rounds: int
    warm: int
    most: int
    devices: dict[str, OnDevice]
    training: Fits
    arms: tuple[str, ...]
    further: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """The options of the command line; None, '' or 0 where nothing was said."""

    words: list[str]
    lengths: list[int] | None
    tokens: int
    batch: int
    ways: str
    segments: str
    seconds: float
    rounds: int
    training: bool
    steps: int
    until: float  # time.time() after which nothing is begun
    out: Path | None
    as_json: bool


@dataclass(frozen=True)
class Settings:
    """What one measurement depends on, besides its arms."""

    protocol: str  # label
    device: str
    threads: int
    compiled: bool
    backend: str  # as asked for; each row has the one that was used
    precision: str
    width: int
    inner: int
    lengths: tuple[int, ...]  # this and the next five are of layers; none and 0 for trainings
    tokens: int  # of a step, 0 with a fixed batch
    batch: int  # fixed for all lengths, 0 if it follows from the tokens
    ways: tuple[str, ...]
    segments: str
    seconds: float
    rounds: int
    warm: int
    most: int
    copy: int
    matrix: int
    training: Fits | None

    def __post_init__(self):
        least = {"tokens": 0, "batch": 0, "seconds": 0, "rounds": 1, "warm": 1, "most": 1, "copy": 1, "matrix": 1}
        at_least("speed", self, least)
        if min(self.lengths, default=1) < 1:
            raise Refusal(f"--lengths must be at least 1, got {listed(self.lengths)}")
        for way in self.ways:
            one_of("--ways", way, WAYS)
        if self.lengths:
            one_of("--segments", self.segments, SEGMENTS)
        if "graph" in self.ways and self.device != "cuda":
            raise Refusal("--ways graph needs a CUDA device; on a CPU: fast, eager, naive")
        if odd := [length for length in self.lengths if self.tokens % length]:
            raise Refusal(f"--lengths {listed(odd)} do not divide --tokens {self.tokens}; or fix --batch instead")

    def examples(self, length: int) -> int:
        """Sequences of one step."""
        return self.batch or self.tokens // length


@dataclass(frozen=True)
class Entry:
    """An arm: a run, or why there is none."""

    name: str
    args: dict
    said: tuple[str, ...]  # the keys that its words set, which tell it from others
    run: Run | None
    refused: str

    @property
    def label(self) -> str:
        return f"{self.name} {text_of({key: self.args[key] for key in self.args if key in self.said})}".strip()


def defaults() -> Defaults:
    return build(Defaults, load_yaml(CONFIGS / "speed.yaml"), "speed")


def read(asked: Asked) -> tuple[Settings, list[Entry], Where]:
    """The settings, arms and place that the command line means."""
    usual = defaults()
    words, where = split(asked.words)
    if not asked.training and not any(word.startswith("protocol=") for word in words):
        words = [f"protocol={usual.protocol}", *words]
    everything = ALL in words
    protocol, common, named = parse_words([word for word in words if word != ALL])
    if everything and named:
        raise Refusal(f"'{ALL}' names every arm; leave out: {listed(arm.name for arm in named)}")
    held = {key: value for key, value in common.items() if key.startswith("protocol.")}
    arms = arms_of(named, everything, {key: common[key] for key in common if key not in held}, usual)
    device = device_of(make_run(protocol, arms[0].name, held, 0, 0), where)
    here = usual.devices[device]
    if not asked.training:
        held = {**here.set, **held}
    entries = entries_of(protocol, held, arms, strict=bool(named))
    return settings(asked, usual, here, where, device, entries), entries, where


def split(words: list[str]) -> tuple[list[str], Where]:
    """The words that are not about where, and where."""
    about = [word for word in words if word.startswith("where.")]
    given = parse_overrides(about)
    if unknown := [key for key in given if key.removeprefix("where.") not in WHERE]:
        raise Refusal(f"speed does not take {listed(unknown)}; allowed: {listed(f'where.{key}' for key in WHERE)}")
    return [word for word in words if word not in about], make_where(given)


def arms_of(named: list[Arm], everything: bool, common: dict, usual: Defaults) -> list[Arm]:
    """Arms with all keys that differ from the mixer's yaml: those of speed.yaml, then `common`, then an arm's own."""
    usually, further = ([parse_arm(line) for line in lines] for lines in (usual.arms, usual.further))
    known = usually + further
    if named:
        pairs = [(arm, own) for arm in named for own in known if own.name == arm.name]
        pairs += [(arm, Arm(arm.name, {})) for arm in named if arm.name not in {own.name for own in known}]
    else:
        pairs = [(Arm(own.name, {}), own) for own in (known if everything else usually)]
    found = []
    for arm, own in pairs:
        fitting = {key: value for key, value in common.items() if key.removeprefix("mixer.") in keys_of(arm.name)}
        found.append(Arm(arm.name, {**own.changes, **fitting, **arm.changes}))
    return found


def entries_of(protocol: str, held: dict, arms: list[Arm], strict: bool) -> list[Entry]:
    """Each arm once. What a mixer refuses is an error where the mixer was named, a row with its reason elsewhere."""
    found = {}
    for arm in arms:
        own = {key.removeprefix("mixer."): value for key, value in arm.changes.items()}
        said = ("sam", *own)
        try:
            for run in runs_of(protocol, held, arm, every_level=True):
                registry.mixer_args(run)
                found.setdefault(run.id, Entry(run.mixer.name, run.mixer.args, said, run, ""))
        except Refusal as error:
            if strict:
                raise
            found.setdefault(f"{arm}", Entry(arm.name, own, said, None, str(error)))
    if all(entry.run is None for entry in found.values()):
        raise Refusal(next(iter(found.values())).refused)
    return list(found.values())


def settings(
    asked: Asked, usual: Defaults, here: OnDevice, where: Where, device: str, entries: list[Entry]
) -> Settings:
    labels = list(dict.fromkeys(entry.run.label for entry in entries if entry.run))
    if len(labels) > 1:
        raise Refusal(f"speed compares mixers under one protocol, got: {listed(labels)}")
    protocol = next(entry.run for entry in entries if entry.run).protocol
    if asked.tokens and asked.batch:
        raise Refusal("--tokens and --batch both set the batch; give one of them")
    if asked.training and (said := given_for_layers(asked)):
        raise Refusal(f"{listed(said)} are for layers; --training takes its sizes from the protocol")
    if not asked.training and asked.steps:
        raise Refusal("--steps goes with --training")
    fits = dataclasses.replace(usual.training, steps=asked.steps or usual.training.steps)
    return Settings(
        **(NO_LAYERS if asked.training else of_layers(asked, usual, here)),
        protocol=labels[0],
        device=device,
        threads=where.threads,
        compiled=where.compiled(device),
        backend=where.backend,
        precision=protocol.precision,
        width=protocol.backbone.width,
        inner=protocol.inner,
        rounds=asked.rounds or (fits.rounds if asked.training else usual.rounds),
        warm=usual.warm,
        most=usual.most,
        copy=here.copy,
        matrix=here.matrix,
        training=fits if asked.training else None,
    )


def of_layers(asked: Asked, usual: Defaults, here: OnDevice) -> dict:
    """The part of the settings that only layers have."""
    return {
        "lengths": tuple(sorted(set(asked.lengths or here.lengths))),
        "tokens": 0 if asked.batch else asked.tokens or here.tokens,
        "batch": asked.batch,
        "ways": tuple(dict.fromkeys(asked.ways.split(","))) if asked.ways else here.ways,
        "segments": asked.segments or usual.segments,
        "seconds": asked.seconds or here.seconds,
    }


def given_for_layers(asked: Asked) -> list[str]:
    """Options that were given and mean nothing to a training."""
    return [f"--{name}" for name in NO_LAYERS if getattr(asked, name)]

"""The command line's words: every verb with its options, and the reading of them. Nothing is done here."""

import argparse
import re
from pathlib import Path
from typing import NoReturn

BARE = ("match", "logs", "speed")  # verbs whose words are not all key=value


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"mixerbench: {message}; see {self.prog} --help\n")


def parser() -> Parser:
    about = "Controlled ablations of sequence mixers: only the mixer varies."
    top = Parser(prog="mixerbench", description=about)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    run = verbs.add_parser("run", help="train and evaluate one run (and its parents)")
    example = "protocol=… mixer=… mixer.sam=true mixer.heads=4 seed=0 where.device=cpu"
    run.add_argument("words", nargs="+", metavar="key=value", help=example)

    sweep = verbs.add_parser("sweep", help="train what is missing of a sweep")
    sweep.add_argument("path", type=Path, metavar="sweeps/x.yaml")
    sweep.add_argument("--workers", type=int, default=1, help="processes on this machine (default: %(default)s)")
    until = "start nothing that cannot finish by then; s, m or h"
    on = "submit the workers to the Slurm cluster of this file, and exit"
    sweep.add_argument("--on", type=Path, default=None, metavar="slurm/c.yaml", help=on)
    sweep.add_argument("--max-parallel", type=int, default=None, metavar="N", help="with --on: tasks at a time")
    sweep.add_argument("--stop-after", type=duration, default=None, metavar="9m", help=until)
    some = "of the sweep's seeds, these only: whole blocks of a table, say before a machine goes back"
    sweep.add_argument("--seeds", type=numbers, default=None, metavar="0,1", help=some)
    sweep.add_argument("words", nargs="*", metavar="where.key=value")

    report = verbs.add_parser("report", help="table, figure and fairness certificate of a sweep, from its records")
    report.add_argument("path", type=Path, metavar="sweeps/x.yaml")
    page = "also one page, page.html: tables that sort and filter, figures, and the runs behind every number"
    report.add_argument("--html", action="store_true", help=page)
    report.add_argument("words", nargs="*", metavar="where.results=…")

    merge = verbs.add_parser("merge", help="bring records of another machine or folder home")
    merge.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="results folder, run folder or records file")
    into = "folder whose records.jsonl takes them"
    merge.add_argument("--into", type=Path, required=True, metavar="results/x", help=into)

    data = verbs.add_parser("data", help="fetch pinned data, make a vocabulary")
    data = data.add_subparsers(dest="data_verb", required=True, metavar="VERB")
    fetch = data.add_parser("fetch", help="fetch or verify a pinned data set")
    fetch.add_argument("name", help="a data set's name or a task of configs/task")
    source = "copy the pinned files from here"
    fetch.add_argument("--from", dest="source", type=Path, default=None, metavar="FOLDER", help=source)
    share = "prepare every n-th file of a large set only, from the k-th on: several can work at once"
    fetch.add_argument("--part", default="1/1", metavar="k/n", help=share)
    vocab = data.add_parser("vocab", help="make a WordPiece vocabulary from a text task's training split")
    vocab.add_argument("task", help="a text task of configs/task")
    vocab.add_argument("--size", type=int, required=True, help="entries")
    vocab.add_argument("--out", type=Path, required=True, metavar="FILE")
    check = verbs.add_parser("check", help="hold a mixer to what every mixer promises: one row a property")
    check.add_argument("name", help="a mixer's name, module:Class, or all")
    check.add_argument("--json", action="store_true", help="rows for machines")
    check.add_argument("--full", action="store_true", help="larger sizes, about a minute a mixer")
    check.add_argument("words", nargs="*", metavar="key=value", help="the mixer's keys: sam=true heads=4 …")
    add_plan(verbs)
    add_tending(verbs)
    add_match(verbs)
    add_show(verbs)
    add_speed(verbs)
    for verb in (fetch, vocab):
        verb.add_argument("words", nargs="*", metavar="where.key=value")
    return top


def add_plan(verbs: argparse._SubParsersAction) -> None:
    plan = verbs.add_parser("plan", help="what of a sweep is done and missing, why, at what cost, to see what effect")
    plan.add_argument("path", type=Path, metavar="sweeps/x.yaml")
    parallel = "runs at a time, each on its own device (default: %(default)s)"
    plan.add_argument("--parallel", type=int, default=1, metavar="N", help=parallel)
    plan.add_argument("--device", default="", metavar="MODEL", help="whose costs; usually the one most is known of")
    plan.add_argument(
        "--pilot", action="store_true", help="first train 60 steps of each protocol and mixer, here or --on"
    )
    plan.add_argument(
        "--on", type=Path, default=None, metavar="slurm/c.yaml", help="submit the pilots to this cluster, and exit"
    )
    plan.add_argument("--json", action="store_true", help="all of it for machines")
    plan.add_argument("words", nargs="*", metavar="where.key=value")


def add_tending(verbs: argparse._SubParsersAction) -> None:
    status = verbs.add_parser("status", help="what each run of a sweep is doing, here and on Slurm, on one screen")
    status.add_argument("--watch", action="store_true", help="again and again, until every run is settled")
    status.add_argument(
        "--all",
        dest="everything",
        action="store_true",
        help="every line of long lists, and what done runs went through",
    )
    logs = verbs.add_parser("logs", help="the end of the log that a run's last attempt wrote to")
    logs.add_argument("--lines", type=int, default=30, metavar="N", help="of the log (default: %(default)s)")
    cancel = verbs.add_parser("cancel", help="end all tasks of a sweep on Slurm; those at work write a checkpoint")
    retry = verbs.add_parser("retry", help="let runs that were given up be tried again, and with --on submit them")
    kinds = "only runs whose last failure is of these kinds, also if they are not given up; or diverged"
    retry.add_argument("--only", type=kinds_of, default=[], metavar="oom,timeout,…", help=kinds)
    retry.add_argument("--on", type=Path, default=None, metavar="slurm/c.yaml", help="as of `sweep`")
    retry.add_argument("--max-parallel", type=int, default=None, metavar="N", help="as of `sweep`")
    retry.set_defaults(workers=1, stop_after=None, seeds=None)
    for verb in (status, logs, cancel, retry):
        verb.add_argument("path", type=Path, metavar="sweeps/x.yaml")
    for verb in (cancel, retry):
        verb.add_argument("words", nargs="*", metavar="where.key=value")
    run = "RUN: an id or its start; without one, which log each run has. Then where.key=value"
    logs.add_argument("words", nargs="*", metavar="RUN", help=run)
    status.add_argument("words", nargs="*", metavar="where.key=value")


def add_match(verbs: argparse._SubParsersAction) -> None:
    match = verbs.add_parser("match", help="what mixers cost under a protocol, and the values that meet one budget")
    rows = (
        "protocol=…, then mixers: NAME or 'NAME mixer.key=value …' (none: all); protocol.… and mixer.… are for all rows"
    )
    match.add_argument("words", nargs="+", metavar="WORD", help=f"{rows}; a list [a,b] is a row each")
    figures = "parameters, mixer_parameters, flops or state"
    match.add_argument("--budget", default="", metavar="FIGURE=NUMBER", help=figures)
    match.add_argument("--like", default="", metavar="MIXER", help="the budget is what this mixer has")
    match.add_argument("--by", default="", metavar="FIGURE", help=f"of --like: {figures} (usually mixer_parameters)")
    match.add_argument("--knob", default="", metavar="KEY", help="turn this key (heads too), not the mixer's own first")
    match.add_argument("--out", type=Path, default=None, metavar="FOLDER", help="write the yaml of those that meet it")
    match.add_argument("--json", action="store_true", help="rows for machines")


def add_show(verbs) -> None:
    about = "draw the matrices that a run's mixers apply to one input, and write them to an .npz"
    show = verbs.add_parser("show", help="heat maps of the matrices that a run's mixers apply to one input")
    show.description = f"{about}. The words are those of `run`, or a run's id, or such an .npz to draw it again."
    show.add_argument("words", nargs="+", metavar="key=value", help="protocol=… mixer=… seed=0, an id, or an .npz")
    of_what = show.add_mutually_exclusive_group()
    of_what.add_argument("--example", type=int, default=0, metavar="N", help="of the held-out set (default: 0)")
    arrays = "a sequence of your own: the arrays of the task's batches (tokens or patches, segments, types)"
    of_what.add_argument("--input", type=Path, default=None, metavar="X.npz", help=arrays)
    show.add_argument("--part", default="", metavar="NAME", help="which held-out set, if the task has several")
    show.add_argument("--layers", type=numbers, default=None, metavar="0,5", help="default: all")
    show.add_argument("--heads", type=numbers, default=None, metavar="0,1", help="default: all")
    show.add_argument("--fresh", action="store_true", help="as training starts: initial values, calibrated gains")
    show.add_argument("--with-skip", action="store_true", help="draw the shell's skip too, M + I")
    where = "default: <results>/show/<run id>, or beside the .npz"
    show.add_argument("--out", type=Path, default=None, metavar="FOLDER", help=where)


def add_speed(verbs) -> None:
    about = "time and memory of a whole layer around each mixer, forward and backward, at several lengths"
    speed = verbs.add_parser("speed", help=about)
    speed.description = f"{about}; or (--training) tokens a second of whole trainings. Defaults: configs/speed.yaml."
    words = "NAME or 'NAME mixer.key=value …' (none: the ablation's arms; all: every arm), mixer.…, protocol=…, "
    more = "protocol.…, where.device=…; or the speed.json of an earlier call, to have its table and figure again"
    speed.add_argument("words", nargs="*", metavar="WORD", help=words + more)
    speed.add_argument("--lengths", type=numbers, default=None, metavar="128,512", help="tokens of a sequence")
    speed.add_argument("--tokens", type=int, default=0, metavar="N", help="of a step: the batch is N / length")
    speed.add_argument("--batch", type=int, default=0, metavar="N", help="sequences of a step, at every length")
    speed.add_argument("--ways", default="", metavar="fast,naive", help="of fast, eager, graph, naive")
    speed.add_argument("--segments", default="", metavar="ROWS", help="full, padded or packed rows")
    speed.add_argument("--seconds", type=float, default=0.0, metavar="S", help="of timed steps of each cell")
    speed.add_argument("--rounds", type=int, default=0, metavar="N", help="turns of each cell, or fits of each mixer")
    training = "time the trainings of a protocol: --training protocol=…"
    speed.add_argument("--training", action="store_true", help=training)
    speed.add_argument("--steps", type=int, default=0, metavar="N", help="with --training: optimiser steps of a fit")
    speed.add_argument("--stop-after", type=duration, default=None, metavar="9m", help="begin nothing later; s, m or h")
    out = "for speed.json, .md, .png, .pdf (default: <results>/speed/<device>)"
    speed.add_argument("--out", type=Path, default=None, metavar="FOLDER", help=out)
    speed.add_argument("--json", action="store_true", help="print the JSON, not the table")


def kinds_of(text: str) -> list[str]:
    """'oom,timeout' as ['oom', 'timeout']; tend.py knows which there are."""
    return [kind for kind in text.replace("|", ",").split(",") if kind]


def numbers(text: str) -> list[int]:
    """'0,5' as [0, 5]."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of numbers like 0,5")
    return [int(number) for number in text.split(",")]


def duration(text: str) -> float:
    """'90s', '9m' or '2h' in seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match:
        raise argparse.ArgumentTypeError(f"'{text}' is not a time like 90s, 9m or 2h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def parse(arguments: list[str]) -> argparse.Namespace:
    """As argparse does, but key=value words (and bare ones of verbs that take such) may also stand behind options."""
    top = parser()
    options, rest = top.parse_known_args(arguments)
    odd = [word for word in rest if word.startswith("-") or ("=" not in word and options.verb not in BARE)]
    if odd or (rest and "words" not in options):
        top.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.words = [*options.words, *rest]
    return options

"""The command line. A room is imported only when its verb is used, so that help needs neither torch nor pandas."""

import argparse
import errno
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench import Refusal
from bench.words import parse

# What the user can mend about a folder: rights, a read-only or full disk, a path that is not there or no folder.
NAMES = ("EACCES", "EPERM", "EROFS", "ENOSPC", "EDQUOT", "ENOTDIR", "EISDIR", "ENOENT", "EEXIST", "ENAMETOOLONG")
UNWRITABLE = tuple(getattr(errno, name) for name in NAMES)


def where_of(words: list[str]):
    from bench.compose import make_where, parse_overrides

    given = parse_overrides(words)
    for key in given:
        if not key.startswith("where."):
            raise Refusal(f"unknown key '{key}'; allowed here: where.…")
    return make_where(given)


def refuse_early(runs: list, where, elsewhere: bool = False) -> None:
    """Refuse early what a worker would refuse, before anything is written. `elsewhere`: its device is not here.

    Data are opened here once, so that several workers find them in the cache and do not all build it at once.
    """
    from bench.config import part_size, with_point
    from bench.registry import backend, check, make_task, mixer_class
    from bench.space import values_of
    from bench.where import device_of, places

    if where.nodes > 1 and not elsewhere:
        raise Refusal(f"where.nodes={where.nodes}: a run on several nodes needs `sweep --on`")
    for one in {(r.protocol_id, str(r.mixer), str(r.point)): r for r in runs}.values():
        acting = with_point(one, values_of(one.point) or {}) if one.is_trial else one
        check(acting)
        group = make_task(acting, places(where)).spec().group
        part_size(one.label, acting.protocol.budget.batch, where.devices * where.nodes, where.micro_batches, group)
        if not elsewhere:
            backend(mixer_class(one.mixer.name), where.backend, device_of(one, where))
    for one in {(str(r.protocol.task), str(r.protocol.tune)): r for r in runs}.values():
        task = make_task(one, places(where))
        task.prepare()
        if one.protocol.tune:
            task.require_disjoint()


def run(options: argparse.Namespace) -> int:
    from bench.compose import parse_run
    from bench.launch import say_missing
    from bench.queue import Queue
    from bench.store import Store
    from bench.sweep import ordered
    from bench.where import results
    from bench.worker import Stop, summary, work

    asked, where = parse_run(options.words)
    chain = ordered([asked])
    store = Store(results(where))
    if store.has(asked.id):
        print(f"in the store already: {summary(asked, store.record(asked.id), store.record(asked.id).cost.wall)}")
        return 0
    refuse_early(chain, where)
    stop = Stop(float("inf"))
    work(Queue(chain, store, where), stop)
    if store.has(asked.id):
        print(f"record: {store.folder(asked.id) / 'record.json'}")
        return 0
    return 130 if stop.signalled else say_missing(chain, store, where.retries)


def sweep(options: argparse.Namespace) -> int:
    from bench import launch
    from bench.provenance import other_code
    from bench.queue import Queue
    from bench.registry import require_metrics
    from bench.store import Store
    from bench.sweep import load, work_of
    from bench.where import results, shares

    where = where_of(options.words)
    if options.on and (options.workers != 1 or options.stop_after is not None or options.seeds):
        raise Refusal("--workers, --stop-after and --seeds are for this machine; with --on see the cluster file")
    if options.max_parallel is not None and (options.on is None or options.max_parallel < 1):
        raise Refusal("--max-parallel must be at least 1 and goes with --on")
    if options.workers < 1:
        raise Refusal(f"--workers must be at least 1, got {options.workers}")
    until = float("inf") if options.stop_after is None else time.time() + options.stop_after
    asked = load(options.path)
    runs = work_of(asked, options.seeds)
    require_metrics([(c.protocol, c.metric) for c in (*asked.columns, asked.family.primary)], runs)
    store = Store(results(where))
    there = {r.id: record for r in runs if (record := store.record(r.id))}  # reads them: a damaged one is refused
    missing = [r for r in runs if r.id not in there]
    print(f"{options.path}: {len(runs)} runs, {len(there)} in the store, {len(missing)} to do", flush=True)
    for line in other_code(missing, list(there.values())):
        print(line, file=sys.stderr)
    queue = Queue(runs, store, where)
    todo = [r for r in runs if not queue.settled(r)]
    if options.on:
        return submit(options, runs, todo, where)
    if todo:
        refuse_early(todo, where)
        shared = shares(where, options.workers)
        code = launch.local(options.path, options.seeds, runs, store, where, options.words, shared, until)
        if code == 130:
            return code
        return launch.say_missing(runs, store, where.retries) or code
    return launch.say_missing(runs, store, where.retries)


def submit(options: argparse.Namespace, runs: list, todo: list, where) -> int:
    """What of a sweep is not done, to Slurm."""
    from bench import submit
    from bench.cluster import load

    cluster = load(options.on)
    if not todo:
        print("nothing to submit")
        return 0
    refuse_early(todo, where, elsewhere=True)
    ids = [r.id for r in runs]
    most = options.max_parallel
    submit.submit(options.path, submit.RUNS, len(todo), ids, options.words, where, cluster, most)
    return 0


def report(options: argparse.Namespace) -> int:
    from rich.console import Console

    from bench.report.frame import Incomplete
    from bench.report.verb import report as make_report
    from bench.store import Store
    from bench.sweep import load
    from bench.where import results

    where, loaded = where_of(options.words), load(options.path)
    store = Store(results(where))
    console = Console() if sys.stdout.isatty() else None  # a file or a pipe gets Markdown
    try:
        written = make_report(loaded, store, store.root / loaded.name, console, options.html)
    except Incomplete as error:
        command = shlex.join(["mixerbench", "sweep", str(options.path), *options.words])
        raise Refusal(f"{error} in {store.root}; `{command}` completes it") from None
    if console is None:
        print((store.root / loaded.name / "table.md").read_text())
    for path in written:
        print(path)
    return 0


def merge(options: argparse.Namespace) -> int:
    from bench.merge import merge as merge_records

    new, total = merge_records(options.paths, options.into)
    print(f"{options.into / 'records.jsonl'}: {new} new, {total} in all")
    return 0


def data(options: argparse.Namespace) -> int:
    from bench.tasks.verbs import fetch_verb, vocab_verb
    from bench.where import places

    at = places(where_of(options.words))
    if options.data_verb == "fetch":
        return fetch_verb(options.name, at, options.source, options.part)
    return vocab_verb(options.task, at, options.size, options.out)


def check(options: argparse.Namespace) -> int:
    from bench.check.verb import check as check_verb

    return check_verb(options.name, options.words, options.json, options.full)


def plan(options: argparse.Namespace) -> int:
    from bench.plan.verb import plan_verb

    where = where_of(options.words)
    if options.on:
        return submit_pilots(options, where)
    if options.pilot:
        from bench.sweep import load, work_of

        refuse_early(work_of(load(options.path), None), where)
    return plan_verb(options.path, where, options.parallel, options.device, options.pilot, options.json)


def submit_pilots(options: argparse.Namespace, where) -> int:
    """The pilots of a sweep that are missing, to Slurm; `plan` reads what they leave."""
    from bench import submit
    from bench.cluster import load
    from bench.plan.verb import pilots_missing

    if not options.pilot:
        raise Refusal("--on goes with --pilot")
    cluster, todo = load(options.on), pilots_missing(options.path, where, options.device)
    if not todo:
        print("every protocol and mixer is measured; another device model is --device MODEL")
        return 0
    refuse_early(todo, where, elsewhere=True)
    submit.submit(options.path, submit.PILOTS, len(todo), [], options.words, where, cluster, None)
    return 0


def status(options: argparse.Namespace) -> int:
    from bench.status import status as show_status
    from bench.where import results

    where = where_of(options.words)
    told = any(word.startswith("where.retries=") for word in options.words)
    return show_status(options.path, where, results(where), told, options.watch, options.everything)


def logs(options: argparse.Namespace) -> int:
    from bench.tend import logs as show_logs
    from bench.where import results

    where = where_of([word for word in options.words if "=" in word])
    names = [word for word in options.words if "=" not in word]
    return show_logs(options.path, where, results(where), names, options.lines)


def cancel(options: argparse.Namespace) -> int:
    from bench.tend import cancel as cancel_tasks
    from bench.where import results

    where = where_of(options.words)
    return cancel_tasks(options.path, where, results(where))


def retry(options: argparse.Namespace) -> int:
    from bench.tend import retry as let_retry
    from bench.where import results

    where = where_of(options.words)
    if options.max_parallel is not None and options.on is None:
        raise Refusal("--max-parallel goes with --on")
    told = any(word.startswith("where.retries=") for word in options.words)
    chosen = let_retry(options.path, where, results(where), told, options.only)
    if options.on:
        return sweep(options)
    if chosen:
        print(f"`mixerbench sweep {options.path}`, here or with --on, does them")
    return 0


def match(options: argparse.Namespace) -> int:
    from bench.match.verb import match as match_verb

    asked = (options.budget, options.like, options.by, options.knob)
    return match_verb(options.words, *asked, options.out, options.json)


def show(options: argparse.Namespace) -> int:
    if [Path(word).suffix for word in options.words] == [".npz"] and "=" not in options.words[0]:
        from bench.report.matrices import redraw

        if options.fresh or options.input or options.part or options.example:
            raise Refusal(f"{options.words[0]} is drawn as it is; allowed: --layers, --heads, --with-skip, --out")
        parts = options.layers, options.heads
        print(*redraw(Path(options.words[0]), *parts, options.out, options.with_skip), sep="\n")
        return 0
    from bench.show import Wanted
    from bench.show import show as show_run

    wanted = Wanted(
        part=options.part,
        example=options.example,
        source=options.input,
        layers=options.layers,
        heads=options.heads,
        fresh=options.fresh,
        with_skip=options.with_skip,
    )
    for path in show_run(options.words, wanted, options.out):
        print(path)
    return 0


def speed(options: argparse.Namespace) -> int:
    if [Path(word).suffix for word in options.words] == [".json"] and "=" not in options.words[0]:
        return speed_again(Path(options.words[0]), options.out)
    from bench.speed.settings import Asked
    from bench.speed.verb import speed as speed_verb

    names = ("words", "lengths", "tokens", "batch", "ways", "segments", "seconds", "rounds", "training", "steps", "out")
    until = float("inf") if options.stop_after is None else time.time() + options.stop_after
    given = {name: getattr(options, name) for name in names}
    return speed_verb(Asked(**given, until=until, as_json=options.json))


def speed_again(path: Path, out: Path | None) -> int:
    """Table and figure of what `speed` measured before: no torch."""
    from rich.console import Console

    from bench.report import speed as report_speed

    console = Console() if sys.stdout.isatty() else None
    written = report_speed.write(report_speed.load(path), out or path.parent, console)
    if console is None:
        print(written[0].read_text())
    for file in written:
        print(file)
    return 0


def main() -> int:
    options = parse(sys.argv[1:])
    verbs = (run, sweep, plan, status, logs, cancel, retry, report, merge, data, check, match, show, speed)
    return guarded({verb.__name__: verb for verb in verbs}[options.verb], options)


def guarded(act: Callable[..., int], given: object) -> int:
    """The exit status that `act` returns; 2 after one line on what a user can mend, 130 after Ctrl-C,
    141 if what reads the output has closed it."""
    try:
        status = act(given)
        sys.stdout.flush()
        return status
    except Refusal as error:
        print(f"mixerbench: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # who read it has enough, as of `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        what = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        print(f"mixerbench: {what}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""What `mixerbench speed` measured, as tables and a figure. Reads its JSON only; the same file, the same bytes.

Time and memory stand against the length, both axes logarithmic: a mixer keeps the colour that it has in all figures, a
filled marker is sequence-aligned, a dotted line is the naive form of the same run.
"""

import json
from pathlib import Path

from bench import Refusal
from bench.report.plots import METADATA, NARROW, WIDTH, few_ticks, filled, looks, settings
from bench.report.sections import Section
from bench.report.tables import bullets, grid
from bench.whole import replace_whole

LINES = {"fast": "-", "eager": "--", "graph": "-.", "naive": ":"}
FURTHER = ("P", "X", "*", "p")  # markers of the second, third ... arm of one mixer and level: no mixer's own
WAYS = {
    "fast": "compiled on a GPU",
    "eager": "the same, not compiled",
    "graph": "a CUDA graph of fast, as training on one GPU is issued",
    "naive": "the mixer's matrix written out, not compiled",
}


def load(path: Path) -> dict:
    try:
        result = json.loads(path.read_text())
    except FileNotFoundError:
        raise Refusal(f"no such file: {path}") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise Refusal(f"{path} is not readable JSON: {' '.join(str(error).split())}") from None
    if not isinstance(result, dict) or result.get("kind") not in ("layers", "trainings") or not result.get("rows"):
        raise Refusal(f"{path} holds no measurement of `mixerbench speed`")
    return result


def write(result: dict, folder: Path, console) -> list[Path]:
    """speed.md, speed.png and speed.pdf in `folder`; also printed if there is a rich `console`."""
    from bench.report.terminal import put

    found = sections(result)
    folder.mkdir(parents=True, exist_ok=True)
    if console is not None:
        for section in found:
            put(console, section.title, section.head, section.lines, section.left, section.notes)
    replace_whole(folder / "speed.md", lambda path: path.write_text(markdown(found)))
    figures = [folder / "speed.png", folder / "speed.pdf"]
    drawn = any(row["seconds"] for row in result["rows"])
    if drawn:
        draw(result, figures)
    return [folder / "speed.md", *(figures if drawn else [])]


def markdown(found: list[Section]) -> str:
    parts = ["# Speed"]
    for section in found:
        parts += [f"## {section.title}", grid(section.head, section.lines, section.left)]
        parts += [bullets(section.notes)] if section.notes else []
    return "\n\n".join(parts) + "\n"


def sections(result: dict) -> list[Section]:
    return of_layers(result) if result["kind"] == "layers" else [of_trainings(result)]


# Tables -------------------------------------------------------------------------------------------------------------


def of_layers(result: dict) -> list[Section]:
    """Time, memory, share of the roofline and speed-up, each with the lengths across."""
    settings, growth = result["settings"], {(g["arm"], g["way"]): g for g in result["growth"]}
    size = f"{settings['tokens']:,} tokens" if settings["tokens"] else f"{settings['batch']} sequences"
    title = f"Layer of width {settings['width']}, forward and backward, {size} a step: milliseconds (quartiles)"
    time = across(result, lambda row: span(row["seconds"], 1e3) + "*" * row["host_bound"], title, growth, "time")
    memory = across(result, mebibytes, "Peak memory, MiB", growth, "memory")
    share = across(result, lambda row: percent(row["share"]), "Share of the roofline", {}, "")
    gain = across(result, lambda row: span(row["speedup"], 1.0), "Times as fast as naive, in the same rounds", {}, "")
    time.notes.extend(outcome_notes(result) + time_notes(result))
    share.notes.append("Roofline: FLOPs / rate + bytes / bandwidth of this run; each stage moves its tensors once.")
    share.notes.append("FLOPs are those of the mixer's plain form: a backend that needs fewer may pass 100 %.")
    found = [time, memory, share]
    return [*found, gain] if any(row["speedup"] for row in result["rows"]) else found


def across(result: dict, text, title: str, growth: dict, figure: str) -> Section:
    """One line an arm and way, one column a length; with `growth` also its exponent, and beside times the state."""
    lengths = sorted({row["length"] for row in result["rows"]})
    lines, sizes = {}, {}
    for row in result["rows"]:
        cells = lines.setdefault((row["arm"], row["way"], row["backend"]), {})
        sizes[row["arm"]] = sizes.get(row["arm"]) or state(row)  # a row that was not begun has none
        cells[row["length"]] = text(row) if row["outcome"] == "ok" else row["outcome"]
    keep = [(key, cells) for key, cells in lines.items() if any(cells.values())]
    head = ["mixer", "way", "backend", *(f"L={length}" for length in lengths)]
    body = [[*key, *(cells.get(length, "") for length in lengths)] for key, cells in keep]
    if growth:
        head += ["growth"] + ["state/head"] * (figure == "time")
        for (arm, way, _), line in zip((key for key, _ in keep), body, strict=True):
            slope = growth.get((arm, way), {}).get(figure)
            line.append("" if slope is None else f"{slope:.2f}")
            line.extend([sizes[arm]] * (figure == "time"))
    return Section(title, head, body, 3, [])


def state(row: dict) -> str:
    if "state" not in row:
        return ""
    return "grows" if row["state"] is None else f"{row['state']:,}"


def span(spread: dict, factor: float) -> str:
    """'1.31 (1.30 to 1.33)'; '1.31 (once)' for a single step, also that of a cell that never had its turn."""
    if not spread:
        return ""
    low, middle, high = (number(factor * spread[key]) for key in ("q1", "median", "q3"))
    return f"{middle} (once)" if spread["n"] < 2 else f"{middle} ({low} to {high})"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def mebibytes(row: dict) -> str:
    return f"{row['peak_memory'] / 2**20:,.0f}"


def number(value: float) -> str:
    """Three digits, without exponents."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def outcome_notes(result: dict) -> list[str]:
    """Why cells have no figures; the same reason once."""
    found = {}
    for row in result["rows"]:
        if row["reason"]:
            who = f"{row['arm']} {row['way']}" if "way" in row else row["arm"]
            found.setdefault((row["outcome"], row["reason"], who), []).append(row.get("length"))
    notes = []
    for (outcome, reason, who), lengths in found.items():
        at = ", ".join(f"L={length}" for length in lengths if length)
        notes.append(f"{outcome}: {who}{' ' if at else ''}{at}: {reason}")
    return notes


def time_notes(result: dict) -> list[str]:
    ways = "; ".join(f"{way}: {WAYS[way]}" for way in result["settings"]["ways"])
    notes = [f"{ways}. Growth: exponent of the length in the time or memory of one sequence; 1 is linear."]
    if any(row["host_bound"] for row in result["rows"]):
        notes.append("*: issuing the step takes the host about as long as the step: the device waits for it.")
    return [*notes, *standing(result)]


def standing(result: dict) -> list[str]:
    """Where and how: device, versions, ceilings."""
    settings, environment, ceilings = result["settings"], result["environment"], result["ceilings"]
    compiled = "compiled" if settings["compiled"] else "not compiled"
    rows = f", {settings['segments']} rows" if settings["segments"] else ""
    how = f"{settings['precision']}, {compiled}, threads: {settings['threads']}{rows}"
    notes = [f"{environment['device']}, torch {environment['torch']}, {how}, protocol {settings['protocol']}."]
    if len(ceilings) == 2:
        copy, rate = ceilings["copy"]["median"], ceilings["matrix"]["median"]
        notes.append(f"Ceilings of this run: copy {copy / 1e12:.3g} TB/s, products {rate / 1e12:.3g} TFLOP/s.")
    return notes


def of_trainings(result: dict) -> Section:
    head = ["mixer", "backend", "tokens/s", "examples/s", "ms a step", "peak MiB", "share", "first step s"]
    lines = []
    for row in result["rows"]:
        if not row["seconds"]:
            lines.append([row["arm"], row["backend"], row["outcome"], *[""] * 5])
            continue
        rates = [span(row[key], 1.0) for key in ("tokens", "examples")]
        rest = [span(row["seconds"], 1e3), mebibytes(row), percent(row["share"]), f"{row['first']:.3g}"]
        lines.append([row["arm"], row["backend"], *rates, *rest])
    title = f"Training of {result['settings']['protocol']}: median (quartiles)"
    about = "Share: FLOPs of the layers at the rate of a large product. Batches are made up beforehand."
    return Section(title, head, lines, 2, [*outcome_notes(result), about, *standing(result)])


# Figure -------------------------------------------------------------------------------------------------------------


def draw(result: dict, paths: list[Path]) -> None:
    """Write the figure once for each path; the suffix (.png, .pdf) names the format."""
    from matplotlib.figure import Figure

    with settings():
        if result["kind"] == "layers":
            figure = Figure(figsize=(WIDTH, 3.2 + 0.05 * len(result["growth"])), layout="constrained")
            panels(figure, result)
        else:
            count = sum(bool(row["seconds"]) for row in result["rows"])
            figure = Figure(figsize=(NARROW, 0.6 + 0.19 * count), layout="constrained")
            rates(figure.subplots(), result)
        for path in paths:
            replace_whole(path, lambda at, suffix=path.suffix: save(figure, at, suffix))


def save(figure, path: Path, suffix: str) -> None:
    figure.savefig(path, dpi=300, format=suffix.removeprefix("."), metadata=METADATA[suffix])


def panels(figure, result: dict) -> None:
    """Milliseconds of a step, and mebibytes at its peak, over the length."""
    from matplotlib.lines import Line2D

    left, right = figure.subplots(1, 2, sharex=True)
    style = styles(result)
    for arm, rows in by_arm(result).items():
        look = style[arm]
        for way in dict.fromkeys(row["way"] for row in rows):
            own = [row for row in rows if row["way"] == way]
            lengths = [row["length"] for row in own]
            line = {"ls": LINES[way], "lw": 0.6 if way == "naive" else 1.0, "ms": 2 if way == "naive" else 3.6}
            line |= {"label": arm if way == own_way(rows) else None, "mew": 0.8, **look}
            left.plot(lengths, [1e3 * row["seconds"]["median"] for row in own], **line)
            right.plot(lengths, [max(row["peak_memory"], 1) / 2**20 for row in own], **line)
            low, high = ([1e3 * row["seconds"][key] for row in own] for key in ("q1", "q3"))
            left.vlines(lengths, low, high, colors=look["color"], lw=0.8)
    for ax, title in ((left, "ms, forward and backward of a layer"), (right, "peak memory, MiB")):
        axis(ax, title, sorted({row["length"] for row in result["rows"]}))
    handles, labels = left.get_legend_handles_labels()
    if any(row["way"] == "naive" for rows in by_arm(result).values() for row in rows):
        handles.append(Line2D([], [], color="0.4", ls=LINES["naive"], lw=0.6))
        labels.append("dotted: naive, " + WAYS["naive"])
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=6, markerscale=0.8)


def own_way(rows: list[dict]) -> str:
    """The way whose line stands for the arm in the legend."""
    return rows[0]["way"]


def by_arm(result: dict) -> dict[str, list[dict]]:
    found = {}
    for row in result["rows"]:
        if row["seconds"]:
            found.setdefault(row["arm"], []).append(row)
    return found


def styles(result: dict) -> dict[str, dict]:
    """Arm -> colour of its mixer and marker: filled if sequence-aligned, of another shape for each further such arm."""
    arms = {row["arm"]: row for row in result["rows"]}
    colours = looks([row["mixer"] for row in arms.values()])
    seen, found = {}, {}
    for arm, row in arms.items():
        level = row["args"].get("sam", False)
        colour, marker = colours[row["mixer"]]
        place = seen[row["mixer"], level] = seen.get((row["mixer"], level), -1) + 1
        marker = marker if place == 0 else FURTHER[(place - 1) % len(FURTHER)]
        found[arm] = {"color": colour, "marker": marker, **filled(level, colour)}
    return found


def axis(ax, title: str, lengths: list[int]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    low, high = ax.get_ylim()
    if sum(low <= place <= high for place in ax.yaxis.get_majorticklocs()) < 2:  # too short a stretch for round powers
        few_ticks(ax.yaxis)
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45 if len(lengths) > 5 else 0)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(color="0.9", lw=0.5)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_title(title, loc="left")
    ax.set_xlabel("length, tokens")


def rates(ax, result: dict) -> None:
    """Tokens a second of each arm: median, and a line from quartile to quartile."""
    from matplotlib.ticker import EngFormatter

    rows = [row for row in result["rows"] if row["seconds"]]
    looked = styles(result)
    for height, row in enumerate(rows):
        tokens = row["tokens"]
        ax.plot([tokens["q1"], tokens["q3"]], [height] * 2, color=looked[row["arm"]]["color"], lw=0.8)
        ax.plot([tokens["median"]], [height], ms=3.6, mew=0.8, ls="", **looked[row["arm"]])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_yticks(range(len(rows)), [row["arm"] for row in rows])
    ax.set_xlim(0, 1.05 * max((row["tokens"]["q3"] for row in rows), default=1))  # the last marker whole
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.set_xlabel("tokens a second")

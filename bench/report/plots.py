"""Figures of a report: what they share (looks, sizes, scales) and the door that draws each one that a table can fill.

One file a figure lies in figures/; each takes its numbers from the analysis and computes none of its own. Neither the
user's settings nor the machine shows: matplotlib's defaults and own font, no date, no version. The same table, the same
bytes. A mixer has one colour and marker in all figures of a table; inside, full is sequence-aligned, empty is not.

Not seaborn: it drops failed runs (NaN) before it averages, brings intervals of its own, cannot fill a marker by half
and costs a second to import; with the numbers given nothing of it is left to use.
"""

import itertools
import multiprocessing
import textwrap
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.config import MISALIGNED
from bench.report.frame import Table, plain
from bench.report.tints import families, tinted

# Looks only: as many mixers as there are colours keep theirs from table to table, and others take what a table leaves;
# so for markers. Append, never reorder.
KNOWN = (
    "attention",
    "low_rank",
    "quasiseparable",
    "toeplitz",
    "dense",
    "cauchy",
    "identity",
    "vandermonde",
    "dft",
    "semiseparable",
    "add",
    "decay_attention",
    "mult",
    "monarch",
    "hyena",
    "s4",
    "fourier",
)
# Okabe and Ito's colours without yellow, which is lost on white, and six more: told apart with every common kind of
# colour blindness (a test simulates them). The light blue comes late: tints of the dark one are like it.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#9C3060", "#000000", "#332288", "#56B4E9")
COLOURS = (*COLOURS, "#9C6CFC", "#663300", "#B4B490")
# And sizes that look alike. None thinner: inside a small cross or star, full and empty are one.
MARKERS = {"o": 1, "s": 0.95, "D": 0.85, "^": 1.1, "v": 1.1, ">": 1.1, "<": 1.1}
FULL, EMPTY, HALF = (0, ()), (0, (3.2, 1.6)), (0, (1, 1.2))  # dashes of a line: of SAM, not SAM, misaligned
WIDTH, NARROW = 6.75, 3.4  # inches: a page of two text columns, and one column for a single panel
LARGE = 2000  # records from which figures are drawn on two cores
DPI = 200  # of the .png; a paper takes the .pdf
ACROSS, LEAST = 4, 1.25  # panels side by side at most; inches of a panel at least
DARK = "0.1"  # of means and intervals
LETTER = 0.053  # inches of a letter in a legend, on average
CROWD = 12  # handles of a legend that would be longer than a narrow figure's panel
BEYOND = 0.6  # how far past the values an interval is drawn, in their span; a longer one ends in an arrow
SETTINGS = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.fontsize": 6.5,
    "pdf.fonttype": 42,  # TrueType: journals refuse Type 3
    "svg.hashsalt": "mixerbench",
}
# Without dates and versions, so that files compare bit for bit.
METADATA = {".png": {"Software": None}, ".pdf": {"Creator": None, "Producer": None, "CreationDate": None}}


@dataclass(frozen=True)
class Look:
    """Of one arm: colour (a tint where a mixer has several), marker, the marker's inside, the line's dashes."""

    label: str
    colour: str
    marker: str
    face: dict
    dashes: tuple

    def dot(self, size: float) -> dict:
        found = {"marker": self.marker, "ms": size * MARKERS[self.marker], "mec": self.colour, "mew": 0.8, **self.face}
        if "fillstyle" in found and self.marker in "<>":  # nearly all of it lies in one half of its box
            found["fillstyle"] = "bottom"
        return found


def draw(table: Table, analysis, folder: Path) -> list[Path]:
    """Write each figure that the table can fill as .png and .pdf into `folder`; delete figures of an earlier report."""
    from bench.report.figures import contrasts, curves, gains, pareto, profile, ranks, responses, seeds

    folder.mkdir(parents=True, exist_ok=True)
    halves = (seeds, pareto, ranks, curves), (gains, contrasts, responses, profile)  # about the same work
    if len(table.rows) < LARGE or "fork" not in multiprocessing.get_all_start_methods():
        found = [draw_some(half, table, analysis, folder) for half in halves]
    else:
        found = in_two_processes(halves, table, analysis, folder)
    written = [path for paths in found for path in paths]
    for old in folder.iterdir():
        if old.suffix in METADATA and old not in written:
            old.unlink()
    return written


def draw_some(modules, table: Table, analysis, folder: Path) -> list[Path]:
    with settings():
        drawn = [save(figure, folder / name) for m in modules for name, figure in m.figures(table, analysis)]
    return [path for paths in drawn for path in paths]


def in_two_processes(halves, table: Table, analysis, folder: Path) -> list[list[Path]]:
    """A large table on two cores. The child sends its paths; if it dies, its half is drawn here and says why."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=lambda: there.send(draw_some(halves[1], table, analysis, folder)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside idle threads of pyarrow and BLAS
        child.start()
    there.close()
    first = draw_some(halves[0], table, analysis, folder)
    try:
        second = here.recv()
    except EOFError:
        second = draw_some(halves[1], table, analysis, folder)
    child.join()
    return [first, second]


@contextmanager
def settings():
    """matplotlib's defaults and SETTINGS, whatever the user has set."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        yield


def save(figure, stem: Path) -> list[Path]:
    """stem.png and stem.pdf; panels are placed once, for both."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)
        figure.set_layout_engine(None)
    paths = [stem.with_name(stem.name + suffix) for suffix in METADATA]
    for path in paths:
        figure.savefig(path, dpi=DPI, metadata=METADATA[path.suffix])
    return paths


# Looks --------------------------------------------------------------------------------------------------------------


def looks(names: list[str]) -> dict[str, tuple[str, str]]:
    """Mixer name -> (colour, marker): its own, or where an earlier mixer has them what fewest have; no pair twice."""
    every = [*KNOWN, *sorted(set(names) - set(KNOWN))]
    found: dict[str, tuple[str, str]] = {}
    for place, name in enumerate(every):
        if name in names:
            taken = list(found.values())
            colours, markers = [colour for colour, _ in taken], [marker for _, marker in taken]
            pairs = itertools.product(turned(COLOURS, place), turned(tuple(MARKERS), place))
            found[name] = min(pairs, key=lambda p: (taken.count(p), colours.count(p[0]), markers.count(p[1])))
    return found


def turned(choices: tuple[str, ...], place: int) -> tuple[str, ...]:
    """From that place on, then those before it."""
    place %= len(choices)
    return choices[place:] + choices[:place]


def arm_looks(table: Table) -> list[Look]:
    """One an arm, in the table's order."""
    style = looks([a.mixer["name"] for a in table.arms])
    twins = {arm.key for arm in table.arms if arm.mixer.get("salt", 0)}  # A/A arms are the paler ones
    alike: dict[tuple, list[str]] = {}
    for arm in table.arms:
        alike.setdefault((arm.mixer["name"], plain(arm.mixer["sam"])), []).append(arm.key)
    found = []
    for arm in table.arms:
        colour, marker = style[arm.mixer["name"]]
        keys = sorted(alike[arm.mixer["name"], plain(arm.mixer["sam"])], key=lambda key: key not in twins)
        level = arm.mixer["sam"]
        if len(keys) > 1:
            colour = tinted(colour, keys.index(arm.key) / (len(keys) - 1))
        dashes = HALF if level == MISALIGNED else FULL if level else EMPTY
        found.append(Look(arm.label, colour, marker, filled(level, colour), dashes))
    return found


def filled(level: bool | str, colour: str) -> dict:
    """A marker's inside: whole for sequence-aligned, empty for not, half for misaligned."""
    if level == MISALIGNED:
        return {"fillstyle": "left", "mfc": colour, "mfcalt": "white"}
    return {"mfc": colour if level else "white"}


def handle(look: Look, label: str, line: bool):
    from matplotlib.lines import Line2D

    kind = {"color": look.colour, "ls": look.dashes, "lw": 1} if line else {"ls": ""}
    return Line2D([], [], label=label, **kind, **look.dot(3.6))


def arm_handles(styles: list[Look], lines: bool) -> list:
    """For a legend that names each arm; of many arms those of one mixer that differ in one key first share a name."""
    labels = [look.label for look in styles]
    named = families(labels) if len(styles) > CROWD else enumerate(labels)
    return [handle(styles[place], label, lines) for place, label in named]


def level_handles(table: Table) -> list:
    """For a legend that says what full and empty markers are, whatever their shapes."""
    from matplotlib.lines import Line2D

    texts = {True: "full: sequence-aligned (SAM)", MISALIGNED: "half: misaligned", False: "empty: not aligned"}
    shown = {a.mixer["sam"] for a in table.arms}
    return [Line2D([], [], ls="", label="; ".join(text for k, text in texts.items() if k in shown))]


def difference_label(metric: str, better: str) -> str:
    """Of the axis of a difference; long names wrap, for the narrowest panels stand four in a row."""
    lines = textwrap.wrap(f"difference in {metric.replace('_', ' ')}", 24)
    return "\n".join([*lines, f"({better} is better)"])


def legend(figure, handles: list, title: str = "") -> None:
    """Below the panels, which keep their height, in as many columns as the longest label allows; long texts wrap.

    A figure of one text column gets two where the legend would be longer than the panel.
    """
    width, tall = figure.get_size_inches()
    if len(handles) > CROWD:
        width = WIDTH
    for handle in handles:
        handle.set_label(textwrap.fill(handle.get_label(), int((width - 0.6) / LETTER)))
    longest = max(len(line) for handle in handles for line in handle.get_label().splitlines())
    columns = max(1, min(len(handles), int((width - 0.1) / (0.4 + LETTER * longest))))
    title = textwrap.fill(title, int((width - 0.1) / LETTER))
    lines = max(handle.get_label().count("\n") + 1 for handle in handles) * -(-len(handles) // columns)
    figure.set_size_inches(width, tall + 0.12 + 0.135 * (lines + len(title.splitlines())))
    look = {"frameon": False, "handletextpad": 0.5, "columnspacing": 1.2, "handlelength": 2.6, "alignment": "center"}
    figure.legend(
        handles=handles, loc="outside lower center", ncols=columns, title=title or None, title_fontsize=6.5, **look
    )


# Panels -------------------------------------------------------------------------------------------------------------


def panels(count: int, tall: float, names: list[str]):
    """(figure, axes of that many panels, which of them begin a row).

    `tall`: inches of one, title and labels too. `names`: of the rows that all panels share, if they do.
    """
    return stacked(count, 1, tall, names)


def stacked(count: int, down: int, tall: float, names: list[str]):
    """panels() of which each `down` in turn stand one above the other, if a row has the room."""
    from matplotlib.figure import Figure

    beside = LETTER * max(map(len, names), default=0)
    most = max(1, min(count, ACROSS, int((WIDTH - beside) / LEAST)))
    down = down if count // down <= most else 1
    across = count // down if down > 1 else -(-count // -(-count // most))  # as many in the last row as can be
    rows, wide = -(-count // across), across > 1 or beside + LEAST > NARROW
    figure = Figure(figsize=(WIDTH if wide else NARROW, rows * tall), layout="constrained")
    grid = figure.subplots(rows, across, squeeze=False)
    for ax in grid.flat[count:]:
        ax.set_visible(False)
    axes = list((grid.T if down > 1 else grid).flat[:count])
    return figure, axes, [ax in grid[:, 0] for ax in axes]


def named_rows(ax, labels: list[str], first: bool) -> None:
    """Arms or pairs down a panel, the first on top, each on a thin line; names left of the first panel only."""
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.set_yticks(range(len(labels)) if first else [], labels if first else [])
    ax.tick_params(axis="y", length=0)
    ax.hlines(range(len(labels)), 0, 1, transform=ax.get_yaxis_transform(), color="0.9", lw=0.5, zorder=0)
    ax.spines[["top", "right", "left"]].set_visible(False)


def title(ax, protocol: str, at_floor: bool) -> None:
    ax.set_title(protocol.replace("[", "\n[") + " (at floor)" * at_floor, loc="left")


def metric_text(measured) -> str:
    return measured.column.metric.replace("_", " ") + (" (smaller is better)" if measured.sign < 0 else "")


def few_ticks(axis) -> None:
    """Three or more up an axis; along one, where labels stand side by side, two may have to do."""
    from matplotlib.ticker import MaxNLocator

    least = 3 if axis.axis_name == "y" else 2
    axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], min_n_ticks=least))


def failed(ax, height: float, text: str) -> None:
    """What stands in a row instead of dots."""
    look = {"va": "center", "color": "0.35", "size": 6, "backgroundcolor": "white"}
    ax.text(0.03, height, text, transform=ax.get_yaxis_transform(), **look)


def window(values, low, high) -> tuple[float, float]:
    """Limits that show all values, and their intervals unless those are far longer than the values' span."""
    import numpy as np

    values, low, high = (np.asarray(v, float).ravel() for v in (values, low, high))
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0, 1.0
    left, right = values.min(), values.max()
    span = right - left or abs(right) or 1.0
    ends = [np.nanmin([left, *low]), np.nanmax([right, *high])]
    left, right = max(ends[0], left - BEYOND * span), min(ends[1], right + BEYOND * span)
    return left - 0.06 * (right - left or span), right + 0.06 * (right - left or span)


def whiskers(ax, interval, rows) -> None:
    """Intervals along x at the heights `rows`, with caps; an end outside the panel is an arrow at its border."""
    import numpy as np

    left, right = ax.get_xlim()
    low, high, rows = interval.low[rows], interval.high[rows], np.asarray(rows)
    ax.hlines(rows, np.maximum(low, left), np.minimum(high, right), color=DARK, lw=0.9, zorder=4)
    for end, inside, border, arrow in ((low, low > left, left, "<"), (high, high < right, right, ">")):
        look = {"ls": "", "mec": DARK, "mfc": DARK, "mew": 0.8, "zorder": 4, "clip_on": False}
        # An empty line has no place, and the layout would make room for it.
        if inside.any():
            ax.plot(end[inside], rows[inside], marker="|", ms=4, **look)
        if not inside.all():
            ax.plot(np.full((~inside).sum(), border), rows[~inside], marker=arrow, ms=2.6, **look)

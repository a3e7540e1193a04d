"""The figure: one panel a column, one line an arm, a dot a seed, a tick at their mean. The same table, the same bytes.

Drawn with matplotlib's objects on its own defaults and its own font, so neither the user's settings nor the machine
shows. Seeds are spread over the height of a line in a fixed order: one seed can be followed from arm to arm.
"""

from pathlib import Path

from bench.config import MISALIGNED
from bench.report.frame import Table
from bench.report.tables import departure_marks, failed_text, summary, tidy

# Looks only: a mixer keeps its colour from figure to figure. Append, never reorder; other names take what is left.
KNOWN = (
    "attention",
    "low_rank",
    "quasiseparable",
    "toeplitz",
    "dense",
    "cauchy",
    "identity",
    "vandermonde",
    "semiseparable",
    "dft",
)
# Okabe and Ito's colours without yellow, which is lost on white: told apart with every common kind of colour blindness.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^")
WIDTH, NARROW = 6.75, 3.4  # inches: a page of two text columns, and one column for a single panel
ACROSS = 4  # panels side by side
SETTINGS = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "pdf.fonttype": 42,  # TrueType: journals refuse Type 3
    "svg.hashsalt": "mixerbench",
}
# Without dates and versions, so that files compare bit for bit.
METADATA = {".png": {"Software": None}, ".pdf": {"Creator": None, "Producer": None, "CreationDate": None}}


def looks(names: list[str]) -> dict[str, tuple[str, str]]:
    """Mixer name -> (colour, marker)."""
    every = [*KNOWN, *sorted(set(names) - set(KNOWN))]
    pairs = [(colour, marker) for marker in MARKERS for colour in COLOURS]
    return {name: pairs[i % len(pairs)] for i, name in enumerate(every)}


def draw(table: Table, paths: list[Path]) -> None:
    """Write the figure once for each path; the suffix (.png, .pdf) names the format."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(SETTINGS)
        across = min(len(table.columns), ACROSS)
        down = -(-len(table.columns) // across)
        width = WIDTH if across > 1 else NARROW
        figure = Figure(figsize=(width, down * (0.55 + 0.19 * len(table.arms)) + 0.45), layout="constrained")
        axes = figure.subplots(down, across, sharey=True, squeeze=False)
        cells = summary(tidy(table))
        for place, ax in enumerate(axes.flat):
            if place < len(table.columns):
                panel(ax, table, cells, place, first=place % across == 0)
            else:
                ax.set_visible(False)
        legend(figure, table, across)
        for path in paths:
            figure.savefig(path, dpi=300, metadata=METADATA[path.suffix])


def panel(ax, table: Table, cells, place: int, first: bool) -> None:
    """One column: its values over the arms, top to bottom in the table's order."""
    column, style = table.columns[place], looks([a.mixer["name"] for a in table.arms])
    marks, n = departure_marks(table), len(table.seeds)
    size = 3.6 if n <= 3 else 2.6
    for height, arm in enumerate(table.arms):
        cell = cells.loc[(arm.label, column.protocol, column.metric)]
        colour, marker = style[arm.mixer["name"]]
        if failed := failed_text(cell):
            ax.text(
                0.03,
                height,
                failed,
                transform=ax.get_yaxis_transform(),
                va="center",
                color="0.35",
                size=6,
                backgroundcolor="white",
            )
            continue
        offsets = [0.0 if n == 1 else 0.44 * (i / (n - 1) - 0.5) for i in range(n)]
        values, heights = [cell[f"seed_{s}"] for s in table.seeds], [height + offset for offset in offsets]
        face = filled(arm.mixer["sam"], colour)
        ax.plot(values, heights, marker, ms=size, mec=colour, **face, mew=0.8, zorder=3)
        if n > 1:
            ax.plot([cell["mean"]] * 2, [height - 0.36, height + 0.36], color="0.1", lw=0.9, zorder=4)
    ax.set_ylim(len(table.arms) - 0.5, -0.5)
    ax.set_yticks(range(len(table.arms)), [a.label + marks[a.key] for a in table.arms])
    ax.tick_params(axis="y", length=0, labelleft=first)
    finish(ax, column)


def filled(level: bool | str, colour: str) -> dict:
    """A marker's inside: whole for sequence-aligned, empty for not, half for misaligned."""
    if level == MISALIGNED:
        return {"fillstyle": "left", "mfc": colour, "mfcalt": "white"}
    return {"mfc": colour if level else "white"}


def finish(ax, column) -> None:
    from matplotlib.ticker import MaxNLocator

    for height in ax.get_yticks():
        ax.axhline(height, color="0.9", lw=0.5, zorder=0)
    ax.margins(x=0.08)
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.set_title(column.protocol.replace("[", "\n["), loc="left")
    ax.set_xlabel(column.metric.replace("_", " "))


def legend(figure, table: Table, across: int) -> None:
    from matplotlib.lines import Line2D

    dot = {"ls": "", "marker": "o", "ms": 3.6, "mec": "0.2", "mew": 0.8}
    texts = {True: "sequence-aligned (SAM)", MISALIGNED: "misaligned", False: "not sequence-aligned"}
    shown = {True, False, *(a.mixer["sam"] for a in table.arms)}
    handles = [Line2D([], [], label=text, **filled(k, "0.2"), **dot) for k, text in texts.items() if k in shown]
    if len(table.seeds) > 1:
        handles.append(Line2D([], [], ls="", marker="|", ms=8, mec="0.1", mew=0.9, label="mean of the seeds"))
    if any(a.departed for a in table.arms):
        handles.append(Line2D([], [], ls="", label="[n] declared departure"))
    look = {"frameon": False, "handletextpad": 0.3, "columnspacing": 1.5}
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) if across > 1 else 2, **look)

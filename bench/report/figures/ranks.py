"""Critical-difference diagram of the primary column: mean rank over seeds, a bar over arms that were not told apart.

The bars are the significance groups of the table (paired t, Holm over all pairs), not Nemenyi's: one rule decides in
text and figure (Benavoli et al. 2016 on why pairwise tests beat mean-rank ones).
"""

from bench.report import stats
from bench.report.analysis import Analysis, Measured, salted
from bench.report.frame import Table
from bench.report.plots import LETTER, WIDTH, Look, arm_looks
from bench.report.responses import primary
from bench.report.stats_bootstrap import caution

LINE, BAR, HEAD, FOOT = 0.17, 0.1, 0.42, 0.36  # inches: a line of a label, a bar, the axis, the notes
MANY = 16  # ranks that are all numbered
MOST = 20  # arms that are shown without a test
WRAPPED = 36  # letters from which a label has its rank on a second line


def figures(table: Table, analysis: Analysis):
    """Needs three arms and three seeds; without a test there are no bars, and of many arms the names hide the rest."""
    measured = primary(table, analysis)
    arms = [place for place, arm in enumerate(table.arms) if not salted(arm)]
    if len(arms) < 3 or len(table.seeds) < 3 or (measured.no_letters and len(arms) > MOST):
        return
    from matplotlib.figure import Figure

    arms = sorted(arms, key=lambda place: measured.rank_A.estimate[place])
    bars = groups(measured, arms)
    half, styles = -(-len(arms) // 2), arm_looks(table)
    texts = {arm: text(measured, arm, styles[arm]) for arm in arms}
    lines = [line for words in texts.values() for line in words.splitlines()]
    line = LINE * max(words.count("\n") + 1 for words in texts.values())
    tall = HEAD + BAR * len(bars) + line * (half + 0.5) + FOOT
    figure = Figure(figsize=(WIDTH, tall))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    ax.set_xlim(0, WIDTH)
    ax.set_ylim(-tall, 0)
    side = 0.2 + LETTER * max(map(len, lines))
    place = rank_axis(ax, len(arms), side)
    for number, bar in enumerate(bars):
        draw_bar(ax, [place(measured.rank_A.estimate[a]) for a in bar], -HEAD - BAR * (number + 0.5))
    top = -HEAD - BAR * len(bars) - 0.7 * line
    for number, arm in enumerate(arms):
        left = number < half
        row = number if left else len(arms) - 1 - number
        label(ax, texts[arm], styles[arm], place(measured.rank_A.estimate[arm]), top - line * row, side, left)
    ax.text(WIDTH / 2, -tall + 0.06, notes(table, analysis, measured), ha="center", va="bottom", size=6, color="0.25")
    yield "critical_difference", figure


def groups(measured: Measured, arms: list[int]) -> list[list[int]]:
    """Arms of each letter, best first; a letter of one arm needs no bar."""
    every = sorted({letter for text in measured.letters for letter in text}, key=lambda x: (x.isupper(), x))
    found = [[a for a in arms if letter in measured.letters[a]] for letter in every]
    return [group for group in found if len(group) > 1]


def rank_axis(ax, count: int, side: float):
    """Draws the axis, best rank on the left; rank -> inches. `side`: inches left and right of it."""
    left, right = side + 0.1, WIDTH - side - 0.1

    def place(rank: float) -> float:
        return left + (rank - 1) / (count - 1) * (right - left)

    ax.plot([left, right], [-HEAD + 0.1] * 2, color="0.1", lw=0.8)
    for rank in range(1, count + 1):
        ax.plot([place(rank)] * 2, [-HEAD + 0.1, -HEAD + 0.16], color="0.1", lw=0.8)
        if count <= MANY or rank == 1 or rank % 5 == 0:
            ax.text(place(rank), -HEAD + 0.19, str(rank), ha="center", va="bottom", size=6)
    return place


def draw_bar(ax, places: list[float], height: float) -> None:
    """A dot for each arm that belongs to it: an arm under the bar without a dot does not."""
    ax.plot([min(places) - 0.03, max(places) + 0.03], [height] * 2, color="0.1", lw=2.2, solid_capstyle="butt")
    ax.plot(places, [height] * len(places), ls="", marker="o", ms=3.4, color="0.1")


def text(measured: Measured, arm: int, look: Look) -> str:
    values_S = measured.values_AS[arm]
    failed = stats.failed_text(int(stats.failures(values_S)), len(values_S))
    rank = "{:.1f} [{:.1f}, {:.1f}]".format(*(float(end[arm]) for end in measured.rank_A))
    return f"{look.label}{'  ' if len(look.label + rank) < WRAPPED else chr(10)}{failed or rank}"


def label(ax, words: str, look: Look, x: float, height: float, side: float, left: bool) -> None:
    """The arm's elbow from the axis to its name, mean rank and interval."""
    edge, away = (side, -0.07) if left else (WIDTH - side, 0.07)
    ax.plot([x, x, edge], [-HEAD + 0.1, height, height], color=look.colour, lw=0.8)
    ax.plot([edge], [height], ls="", **look.dot(4))
    ax.text(edge + away, height, words, ha="right" if left else "left", va="center", size=6.5)


def notes(table: Table, analysis: Analysis, measured: Measured) -> str:
    n, what = len(table.seeds), f"{measured.column.protocol}: {measured.column.metric.replace('_', ' ')}"
    warn = f", {caution(n)}" if caution(n) else ""
    first = f"{what}; mean rank over n = {n} seeds [{100 * (1 - analysis.alpha):g} % bootstrap{warn}]; 1 is best"
    second = "bars join arms that were not declared different (paired t, Holm over all pairs)"
    return f"{first}\n{f'no bars: {measured.no_letters} all pairs' if measured.no_letters else second}"

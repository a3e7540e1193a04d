"""What a mixer does, drawn: its matrices as a grid of heat maps, layers down, heads across. Reads one .npz, no torch.

The file holds all that the picture says, so a figure can be drawn again anywhere. The same file, the same bytes.
Axes: N layers, H heads, L real tokens (padding is left out); row i of a matrix is the output token, column j the input.
"""

import json
import textwrap
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench import Refusal
from bench.report.plots import METADATA, NARROW, WIDTH, settings
from bench.whole import replace_whole

COLOURS = "RdBu_r"  # diverging, white at 0, told apart with every common kind of colour blindness
COVERED = 0.995  # share of a layer's entries off the diagonal that the colours cover; the others take the last colour
NOTHING = 1e-6  # of a layer's largest entry: smaller ones are 0 to the colours
ACROSS, TALL, PAGES = 8, 8.6, 12  # heads side by side; inches of panels on a page; pages of one figure
LARGEST = 2.6  # inches of a panel, unless names of tokens need more
NAME_POINTS, NAME_LETTERS = 3.8, 12  # least height of a token's name, and how much of it is written
PROSE, NAMES = 132, 112  # letters to the inch, in type of one point
SHRUNK = 0.8  # what panels may lose so that all layers fit on one page
ABOVE, BESIDE, BAR = 0.17, 0.06, 0.46  # inches over a panel (its head and largest entry), right of it, for colour bars
ABOUT = ("id", "label", "mixer", "sam", "seed", "trained", "input", "skip")  # what a picture says of its run


@dataclass(frozen=True)
class Matrices:
    m_NHLL: np.ndarray  # the matrix times the shell's scale, fp64
    layers_N: np.ndarray
    heads_H: np.ndarray
    segments_L: np.ndarray  # number of each token's document
    names_L: np.ndarray  # of the tokens, '' each if they have none
    about: dict  # ABOUT, and beside it whatever says where the numbers come from

    def part(self, layers: list[int] | None, heads: list[int] | None) -> "Matrices":
        """Some layers and heads by number, in the order given (None: all); a Refusal for one that is not there."""
        at_N = places("layer", layers, self.layers_N.tolist())
        at_H = places("head", heads, self.heads_H.tolist())
        m_NHLL = self.m_NHLL[at_N][:, at_H]
        return replace(self, m_NHLL=m_NHLL, layers_N=self.layers_N[at_N], heads_H=self.heads_H[at_H])


def places(kind: str, wanted: list[int] | None, there: list[int]) -> list[int]:
    """Where the wanted numbers stand among those there are."""
    if wanted is None:
        return list(range(len(there)))
    for number in wanted:
        if number not in there:
            raise Refusal(f"no {kind} {number}; there are: {', '.join(map(str, there))}")
    if len(set(wanted)) < len(wanted):
        raise Refusal(f"a {kind} is named twice: {', '.join(map(str, wanted))}")
    return [there.index(number) for number in wanted]


# The file -----------------------------------------------------------------------------------------------------------


def save(matrices: Matrices, path: Path) -> None:
    """Write the .npz, whole or not at all; bitwise equal for equal contents."""
    arrays = {name: value for name, value in vars(matrices).items() if name != "about"}
    about = np.array(json.dumps(matrices.about, sort_keys=True))

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays, about=about)

    replace_whole(path, write)


def load(path: Path) -> Matrices:
    """The matrices of a file that `save` wrote; a Refusal for any other file. Nothing in it is executed."""
    arrays = arrays_of(path)
    wanted = {"m_NHLL": ("f", 4), "layers_N": ("i", 1), "heads_H": ("i", 1), "segments_L": ("i", 1)}
    wanted |= {"names_L": ("U", 1), "about": ("U", 0)}
    if set(arrays) != set(wanted):
        raise Refusal(f"{path} is no file of matrices: it holds {', '.join(arrays)}; wanted: {', '.join(wanted)}")
    for name, (kind, axes) in wanted.items():
        if (arrays[name].dtype.kind, arrays[name].ndim) != (kind, axes):
            raise Refusal(
                f"{path}: {name} is {arrays[name].dtype} with {arrays[name].ndim} axes, not as it was written"
            )
    length = len(arrays["segments_L"])
    if arrays["m_NHLL"].shape != (len(arrays["layers_N"]), len(arrays["heads_H"]), length, length):
        raise Refusal(
            f"{path}: m_NHLL has shape {arrays['m_NHLL'].shape}, which does not fit its layers, heads, tokens"
        )
    try:
        about = json.loads(str(arrays.pop("about")))
        lost = [key for key in ABOUT if key not in about]
    except (json.JSONDecodeError, TypeError) as error:
        raise Refusal(f"{path}: about is not the JSON that was written ({error})") from None
    if lost or len(arrays["names_L"]) != length or not np.isfinite(arrays["m_NHLL"]).all():
        raise Refusal(f"{path} is damaged: {'lacks ' + ', '.join(lost) if lost else 'names or entries are wrong'}")
    return Matrices(**arrays, about=about)


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz; a Refusal for a file that is none or that holds Python objects."""
    if path.is_file() and not zipfile.is_zipfile(path):  # numpy takes it for a pickle and advises to load it unsafely
        raise Refusal(f"{path} is no .npz; wanted: the file of numpy.savez, with named arrays")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise Refusal(f"no such file: {path}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise Refusal(f"{path} is not a readable .npz without Python objects: {' '.join(str(error).split())}") from None


# The figure ---------------------------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """Sizes of a page, in inches, and how panels are dealt to pages."""

    panel: float
    left: float  # of the first panel: the layer's name and those of the tokens
    below: float  # the last panel: ticks
    across: int
    down: int
    points: float  # size of the tokens' names, 0: numbers instead


def grid(matrices: Matrices) -> Grid:
    """Panels as large as the width allows; names of tokens where they can be read."""
    layers, heads, length, _ = matrices.m_NHLL.shape
    across = -(-heads // -(-heads // ACROSS))
    letters = min(NAME_LETTERS, max(map(len, matrices.names_L), default=0))
    named = 0.2 + letters * 0.6 * 5 / 72
    panel = (WIDTH - BAR - named) / across - BESIDE
    if letters and panel / length * 72 >= NAME_POINTS:
        panel = min(panel, max(LARGEST, NAME_POINTS * 1.1 * length / 72))
        points, left = min(5.0, 0.95 * panel * 72 / length), named
        below = 0.1 + letters * 0.6 * points / 72
    else:
        points, left, below = 0.0, 0.4, 0.17
        panel = min((WIDTH - BAR - left) / across - BESIDE, LARGEST)
        fitting = TALL / layers - ABOVE
        panel = min(panel, fitting) if fitting >= SHRUNK * panel else panel
    most = max(1, int(TALL / (panel + ABOVE) + 1e-9))
    return Grid(panel, left, below, across, -(-layers // -(-layers // most)), points)


def redraw(
    path: Path, layers: list[int] | None, heads: list[int] | None, out: Path | None, with_skip: bool
) -> list[Path]:
    """The figure of a file that `show` wrote, without torch, data or weights; with the skip too if `-skip` at the end
    of its name says that it was drawn so."""
    name = path.stem.removesuffix("-skip")
    with_skip = with_skip or name != path.stem
    return draw(load(path).part(layers, heads), (out or path.parent) / f"{name}{'-skip' * with_skip}", with_skip)


def draw(matrices: Matrices, stem: Path, with_skip: bool) -> list[Path]:
    """Write stem.png and stem.pdf (further pages: stem.page2.png, ...), each whole; the paths.

    `with_skip` draws what the shell adds too, + I. Refuses that where it adds nothing, more panels than a figure holds,
    and a folder that cannot be made.
    """
    from matplotlib.figure import Figure

    if with_skip and not matrices.about["skip"]:
        raise Refusal("the shell of this protocol has no skip (protocol.shell.skip=false), so there is none to draw")
    sizes = grid(matrices)
    pages = list(dealt(matrices, sizes))
    if len(pages) > PAGES:
        there = f"{len(matrices.layers_N)} layers x {len(matrices.heads_H)} heads"
        raise Refusal(f"{there} need {len(pages)} pages, a figure has at most {PAGES}; choose with --layers, --heads")
    made(stem.parent)
    written = []
    with settings():
        limits = {int(n): limit(shown(m_HLL, with_skip)) for n, m_HLL in zip(*layers_of(matrices), strict=True)}
        for number, page in enumerate(pages, 1):
            figure = Figure()
            compose(figure, page, sizes, limits, with_skip)
            for suffix in (".png", ".pdf"):
                path = stem.with_name(f"{stem.name}{'' if number == 1 else f'.page{number}'}{suffix}")
                write(figure, path)
                written.append(path)
    for old in stem.parent.glob(f"{stem.name}.page*.p*"):  # of an earlier figure with more pages
        if old not in written and old.suffix in METADATA:
            old.unlink()
    return written


def made(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refusal(f"folder {folder} cannot be made: {error.strerror}; name another with --out") from None


def write(figure, path: Path) -> None:
    kind, metadata = path.suffix.removeprefix("."), METADATA[path.suffix]
    replace_whole(path, lambda temporary: figure.savefig(temporary, format=kind, dpi=300, metadata=metadata))


def dealt(matrices: Matrices, sizes: Grid):
    """The pages: some layers and heads each, layers first."""
    layers, heads = matrices.layers_N.tolist(), matrices.heads_H.tolist()
    for top in range(0, len(layers), sizes.down):
        for first in range(0, len(heads), sizes.across):
            yield matrices.part(layers[top : top + sizes.down], heads[first : first + sizes.across])


def layers_of(matrices: Matrices):
    return matrices.layers_N, matrices.m_NHLL


def shown(m_HLL: np.ndarray, with_skip: bool) -> np.ndarray:
    return m_HLL + np.eye(m_HLL.shape[-1]) if with_skip else m_HLL


def limit(m_HLL: np.ndarray) -> float:
    """Where a layer's colours end. The diagonal does not count, or a large one would hide what lies beside it."""
    sizes = np.abs(m_HLL)
    largest = sizes.max(initial=0.0)
    beside = sizes[:, ~np.eye(m_HLL.shape[-1], dtype=bool)]
    beside = beside[beside > NOTHING * largest]
    return float(np.quantile(beside, COVERED, method="higher")) if len(beside) else float(largest or 1.0)


def compose(figure, page: Matrices, sizes: Grid, limits: dict[int, float], with_skip: bool) -> None:
    """One page, every panel at its place in inches."""
    layers, heads = page.m_NHLL.shape[:2]
    panels = sizes.left + heads * (sizes.panel + BESIDE)
    width = max(NARROW, panels + BAR)
    head = textwrap.wrap(title(page.about), int(width * NAMES / 7))
    foot = textwrap.wrap(caption(page, with_skip), int(width * PROSE / 6))
    top = 0.08 + 0.12 * len(head)
    tall = top + layers * (sizes.panel + ABOVE) + sizes.below + 0.1 * len(foot) + 0.1
    figure.set_size_inches(width, tall)
    figure.text(0.04 / width, 1 - 0.04 / tall, "\n".join(head), va="top", size=7, parse_math=False, linespacing=1.15)
    figure.text(0.04 / width, 0.03 / tall, "\n".join(foot), va="bottom", size=6, parse_math=False, linespacing=1.15)
    for row, (layer, m_HLL) in enumerate(zip(*layers_of(page), strict=True)):
        y = tall - top - (row + 1) * (sizes.panel + ABOVE)
        for column, m_LL in enumerate(shown(m_HLL, with_skip)):
            x = sizes.left + column * (sizes.panel + BESIDE)
            ax = figure.add_axes((x / width, y / tall, sizes.panel / width, sizes.panel / tall))
            image = panel(ax, m_LL, limits[int(layer)], page, sizes, column == 0, row == layers - 1)
            ax.set_title(f"head {page.heads_H[column]}", loc="left", size=5.5, pad=2)
            ax.set_title(f"max {np.abs(m_LL).max():.2g}", loc="right", size=5.5, pad=2)
        figure.text(0.05 / width, (y + sizes.panel / 2) / tall, f"layer {layer}", rotation=90, va="center", size=6.5)
        bar = figure.add_axes(((panels + 0.02) / width, y / tall, 0.07 / width, sizes.panel / tall))
        beyond = np.abs(shown(m_HLL, with_skip)).max() > limits[int(layer)]
        colour_bar(figure, image, bar, "both" if beyond else "neither")


def panel(ax, m_LL: np.ndarray, bound: float, page: Matrices, sizes: Grid, first: bool, last: bool):
    """One head's heat map; the image."""
    length = len(m_LL)
    image = ax.imshow(m_LL, cmap=COLOURS, vmin=-bound, vmax=bound)
    for border in np.flatnonzero(np.diff(page.segments_L)) + 0.5:
        ax.axhline(border, color="0.25", lw=0.5)
        ax.axvline(border, color="0.25", lw=0.5)
    ax.tick_params(length=0 if sizes.points else 1.5, width=0.4, pad=1.5, labelsize=5)
    ax.tick_params(left=first, labelleft=first, bottom=last, labelbottom=last)
    ax.spines[:].set_linewidth(0.4)
    if sizes.points:
        names = [drawable(name) for name in page.names_L]
        ax.set_xticks(range(length), names, size=sizes.points, rotation=90, parse_math=False)
        ax.set_yticks(range(length), names, size=sizes.points, parse_math=False)
        return image
    step = max(1, next(s for k in range(9) for s in (10**k, 2 * 10**k, 5 * 10**k) if length / s <= 5))
    ax.set_xticks(range(0, length, step))
    ax.set_yticks(range(0, length, step))
    return image


def colour_bar(figure, image, ax, extend: str) -> None:
    from matplotlib.ticker import MaxNLocator

    bar = figure.colorbar(image, cax=ax, extend=extend, extendfrac=0.04, ticks=MaxNLocator(4, steps=[1, 2, 5, 10]))
    bar.outline.set_linewidth(0.4)
    ax.tick_params(length=1.5, width=0.4, pad=1.5, labelsize=5)


def drawable(name: str) -> str:
    """A token's name, cut to NAME_LETTERS, an empty square for what the figure's font does not have."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    name = name if len(name) <= NAME_LETTERS else name[: NAME_LETTERS - 1] + "…"
    return "".join(letter if font.get_char_index(ord(letter)) and letter.isprintable() else "□" for letter in name)


def title(about: dict) -> str:
    level = {True: "sequence-aligned", False: "not sequence-aligned"}.get(about["sam"], about["sam"])
    state = "trained" if about["trained"] else "before training"
    label = about["label"].replace(",", ", ")  # so that a line may end there
    run = f"{label}, seed {about['seed']}, {state}, run {about['id']}"
    return f"{about['mixer']} ({level}); {run}; {about['input']}"


def caption(page: Matrices, with_skip: bool) -> str:
    """What is drawn, and how to read it."""
    what = "the mixer's matrix M as the shell applies it (times its scale)"
    if page.about["skip"]:
        what += ", with the shell's skip (+ I)" if with_skip else "; the shell's skip (+ I) is left out"
    text = f"Drawn: {what}. Row: output token, column: input token. Colours are common to a layer and cover"
    text += f" {100 * COVERED:g} % of its entries off the diagonal; max: largest |entry| of a panel."
    return text + (" Lines: borders of documents." if len(np.unique(page.segments_L)) > 1 else "")

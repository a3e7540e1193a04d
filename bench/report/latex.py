"""LaTeX of a report: booktabs tables to \\input into a paper, and a page that compiles as it is and shows them.

Cells are the same texts as in Markdown; means and intervals are set in math mode, letters as superscripts.
"""

import re

from bench.report.frame import Table
from bench.report.tables import count_text, throughput, wide

SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "±": r"$\pm$",
    "°": r"$^{\circ}$",
}
BREAK = r"\\"  # ends a row
LETTERS = 165  # of a line that shrinks to a page at three quarters of its size
NUMBER = r"[+-]?\d[\d,]*(?:\.\d+)?"
PAGE = r"""\documentclass{article}
\usepackage[margin=2cm]{geometry}
\usepackage{booktabs,graphicx}
\begin{document}
\input{table.tex}
\end{document}
"""


def fragment(table: Table, analysis, sections: list) -> str:
    """The tables alone, for \\input; they need the packages booktabs and graphicx."""
    head, lines, notes = wide(table, analysis)
    head, lines = with_speed(table, head, lines)
    parts = [tabular(table.sweep.name, table.sweep.question, head, lines, 2, notes)]
    for section in sections:
        parts.append(tabular(table.sweep.name, section.title, section.head, section.lines, section.left, section.notes))
    return "% needs \\usepackage{booktabs,graphicx}\n" + "\n".join(parts)


def with_speed(table: Table, head: list[str], lines: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Positions a second as the runs ran, of the sweep's first column."""
    speeds = [throughput(table, arm, table.protocols()[:1]) for arm in table.arms]
    texts = ["-" if speed != speed else count_text(round(speed)) for speed in speeds]
    return [*head, "tokens/s"], [[*line, text] for line, text in zip(lines, texts, strict=True)]


def tabular(sweep: str, title: str, head: list[str], lines: list[list[str]], left: int, notes: list[str]) -> str:
    """One table; a wider one than a page is several, each with the first columns, and the notes under the last."""
    label = re.sub(r"[^a-z0-9]+", "-", f"{sweep} {title}".lower()).strip("-")[:60]
    parts = parted(head, lines, left)
    found = []
    for number, places in enumerate(parts, 1):
        caption = title if number == 1 else f"{title} (continued)"
        heads, cells = [head[i] for i in places], [[line[i] for i in places] for line in lines]
        below = notes if number == len(parts) else []
        found.append(one_table(caption, label + f"-{number}" * (number > 1), heads, cells, left, below))
    return "".join(found)


def parted(head: list[str], lines: list[list[str]], left: int) -> list[list[int]]:
    """Columns of each part: the first `left` of them, and others in order as long as they fit."""
    widths = [max(map(len, [*stacked(h), *cells])) + 2 for h, *cells in zip(head, *lines, strict=True)]
    parts, used = [[*range(left)]], sum(widths[:left])
    for place in range(left, len(head)):
        if len(parts[-1]) > left and used + widths[place] > LETTERS:
            parts.append([*range(left)])
            used = sum(widths[:left])
        parts[-1].append(place)
        used += widths[place]
    return parts


def stacked(text: str) -> list[str]:
    """A head's lines: 'mini_mlm: loss' is two."""
    return text.split(": ", 1)


def head_cell(text: str, left: bool) -> str:
    first, *more = (escaped(part) for part in stacked(text))
    stack = rf"\begin{{tabular}}[b]{{@{{}}{'l' if left else 'r'}@{{}}}}{first} {BREAK} {''.join(more)}\end{{tabular}}"
    return stack if more else first


def one_table(title: str, label: str, head: list[str], lines: list[list[str]], left: int, notes: list[str]) -> str:
    spec = "l" * left + "r" * (len(head) - left)
    top = " & ".join(head_cell(h, place < left) for place, h in enumerate(head))
    body = f" {BREAK}\n".join(" & ".join(cell(c) for c in line) for line in lines)
    below = "\n\n".join(escaped(n) for n in notes)
    foot = f"""
\\smallskip
\\begin{{minipage}}{{\\linewidth}}\\raggedright\\scriptsize
{below}
\\end{{minipage}}"""
    return f"""\\begin{{table}}[htbp]
\\centering\\footnotesize\\setlength{{\\belowcaptionskip}}{{4pt}}
\\caption{{{escaped(title)}}}\\label{{tab:{label}}}
\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{%
\\begin{{tabular}}{{{spec}}}
\\toprule
{top} {BREAK}
\\midrule
{body} {BREAK}
\\bottomrule
\\end{{tabular}}}}
{foot if notes else ""}
\\end{{table}}
"""


def cell(text: str) -> str:
    """'0.508 ± 0.011 ab' -> '$0.508 \\pm 0.011$\\textsuperscript{ab}'; '+0.1 [-0.2, +0.3]*' -> math and the mark."""
    match = re.fullmatch(rf"({NUMBER})(?: ± ({NUMBER}))?(?: ([a-zA-Z]+))?", text)
    if match:
        value, spread, letters = match.groups()
        plus = rf" \pm {grouped(spread)}" if spread else ""
        text = f"${grouped(value)}{plus}$"
        return text + (rf"\textsuperscript{{{letters}}}" if letters else "")
    match = re.fullmatch(rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\]([*°]?)", text)
    if match:
        value, low, high, mark = match.groups()
        mark = {"*": r"^{*}", "°": r"^{\circ}", "": ""}[mark]
        return rf"${grouped(value)}{mark}\;[{grouped(low)}, {grouped(high)}]$"
    return escaped(text)


def grouped(number: str) -> str:
    """A comma between digits without the space that math mode would put there."""
    return number.replace(",", "{,}")


def escaped(text: str) -> str:
    text = re.sub(r"`([^`]*)`", r"\1", text)
    return "".join(SPECIAL.get(c, c) for c in text).replace("[", "{[}")

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
    head, lines = with_costs(table, head, lines)
    parts = [tabular(table.sweep.name, table.sweep.question, head, lines, 2, notes)]
    for section in sections:
        parts.append(tabular(table.sweep.name, section.title, section.head, section.lines, section.left, section.notes))
    return "% needs \\usepackage{booktabs,graphicx}\n" + "\n".join(parts)


def with_costs(table: Table, head: list[str], lines: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """FLOPs of the mixers and positions a second as the runs ran; both of the sweep's first column."""
    first, found = table.protocols()[:1], []
    for arm, line in zip(table.arms, lines, strict=True):
        rows = [r for r in table.cell(first[0], arm) if r.trained]
        speed = throughput(table, arm, first)
        flops = count_text(rows[0].record.capacity.flops) if rows else "-"
        found.append([*line, flops, "-" if speed != speed else count_text(round(speed))])
    return [*head, "FLOPs", "tokens/s"], found


def tabular(sweep: str, title: str, head: list[str], lines: list[list[str]], left: int, notes: list[str]) -> str:
    spec = "l" * left + "r" * (len(head) - left)
    rows = [" & ".join(escaped(h) for h in head), *(" & ".join(cell(c) for c in line) for line in lines)]
    label = re.sub(r"[^a-z0-9]+", "-", f"{sweep} {title}".lower()).strip("-")[:60]
    body = " \\\\\n".join(rows[1:])
    below = "\n\n".join(escaped(n) for n in notes)
    return f"""\\begin{{table}}[htbp]
\\centering\\footnotesize\\setlength{{\\belowcaptionskip}}{{4pt}}
\\caption{{{escaped(title)}}}\\label{{tab:{label}}}
\\resizebox{{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}}{{!}}{{%
\\begin{{tabular}}{{{spec}}}
\\toprule
{rows[0]} \\\\
\\midrule
{body} \\\\
\\bottomrule
\\end{{tabular}}}}

\\smallskip
\\begin{{minipage}}{{\\linewidth}}\\raggedright\\scriptsize
{below}
\\end{{minipage}}
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

"""Tables of text, given as a list of rows of cells; the first row is the heading."""

from collections.abc import Sequence


def aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table for the screen: first column left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells
    ]


def latex(cells: Sequence[Sequence[str]]) -> str:
    """A table in LaTeX, without packages; the columns after the first to the right."""
    lines = [" & ".join(map(_in_latex, row)) + r" \\" for row in cells]
    columns = "l" + "r" * (len(cells[0]) - 1)
    return "\n".join([
        rf"\begin{{tabular}}{{{columns}}}", r"\hline", lines[0], r"\hline", *lines[1:], r"\hline",
        r"\end{tabular}", "",
    ])  # fmt: skip


def _in_latex(text: str) -> str:
    special = {c: rf"\{c}" for c in "&%$#_{}"} | {
        "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
        "±": r"$\pm$",
    }  # fmt: skip
    return "".join(special.get(character, character) for character in text)


def markdown(cells: Sequence[Sequence[str]], others: str = "---:") -> str:
    """A table in Markdown; `others` is the rule that aligns the columns after the first."""
    heading, *body = cells
    rule = ["---", *[others] * (len(heading) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (heading, rule, *body))

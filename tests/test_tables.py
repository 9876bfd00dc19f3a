"""What a table looks like, on the screen, in Markdown and in LaTeX."""

from experiment.tables import aligned, latex, markdown

CELLS = [["method", "d", "e"], ["a", "50.00 ± 0.00 %", ""], ["longest name", "-", "1"]]


def test_lines_on_the_screen_are_of_one_length():
    lines = aligned(CELLS)
    assert len({len(line) for line in lines}) == 1 and lines[0].startswith("method  ")
    assert lines[1].startswith("a ") and lines[2].endswith(" 1")


def test_a_table_in_markdown_has_its_rule_below_the_heading():
    assert markdown(CELLS).splitlines() == [
        "| method | d | e |",
        "| --- | ---: | ---: |",
        "| a | 50.00 ± 0.00 % |  |",
        "| longest name | - | 1 |",
    ]
    assert markdown(CELLS, "---").splitlines()[1] == "| --- | --- | --- |"


def test_a_table_in_latex_has_no_character_that_means_something_there():
    cells = [["run", "a_b"], ["c & d", r"5 ± 1 %, {x^2}\\"]]
    assert latex(cells).splitlines() == [
        r"\begin{tabular}{lr}",
        r"\hline",
        r"run & a\_b \\",
        r"\hline",
        r"c \& d & 5 $\pm$ 1 \%, \{x\textasciicircum{}2\}\textbackslash{}\textbackslash{} \\",
        r"\hline",
        r"\end{tabular}",
    ]

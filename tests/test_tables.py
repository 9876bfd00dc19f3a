"""What a table looks like, on the screen and in Markdown."""

from experiment.tables import aligned, markdown

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

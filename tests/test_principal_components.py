"""Principal components against a singular value decomposition, and what a projection keeps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from comparison.principal_components import principal_components, projection
from data_sets.image_data import DataError, ImageData
from kernels.logistic_regression import fit_logistic
from linear_probe import extract_features
from mnist_datasets import normalize_pixels


def correlated_images(count=300, shape=(1, 5, 4), seed=0) -> ImageData:
    """Bytes with correlations between pixels; labels of three classes that depend on them."""
    random = np.random.default_rng(seed)
    pixels = int(np.prod(shape))
    hidden = random.normal(size=(count, pixels)) * np.geomspace(1, 0.1, pixels)
    x = hidden @ np.linalg.qr(random.normal(size=(pixels, pixels)))[0]
    images = torch.from_numpy((128 + 40 * x).clip(0, 255).astype(np.uint8)).view(count, *shape)
    scores = x[:, :2] + random.normal(size=(count, 2))
    labels = torch.from_numpy(np.where(scores[:, 0] > 0, 2, scores[:, 1] > 0).astype(np.int64))
    return ImageData(images, labels, "made up")


def pixels(data: ImageData) -> np.ndarray:
    return data.floats(dtype=torch.float64).flatten(1).numpy()


def features(data: ImageData, k: int) -> torch.Tensor:
    return extract_features(*projection(principal_components(data), k, torch.float64), data)


@pytest.fixture(params=["bytes", "normalised"])
def data(request) -> ImageData:
    plain = correlated_images()
    return plain if request.param == "bytes" else normalize_pixels(plain, plain)[0]


def test_components_are_those_of_a_singular_value_decomposition(data):
    mean, components, variances = principal_components(data)
    x = pixels(data)
    _, singular, expected = np.linalg.svd(x - x.mean(0), full_matrices=False)
    np.testing.assert_allclose(mean, x.mean(0), atol=1e-13)
    np.testing.assert_allclose(variances, singular**2 / len(x), rtol=1e-10)
    cosines = (components.numpy() * expected).sum(1)
    np.testing.assert_allclose(abs(cosines), 1, atol=1e-10)


def test_the_largest_entry_of_a_component_is_positive(data):
    _, components, _ = principal_components(data)
    largest = components.abs().argmax(1, keepdim=True)
    assert (components.gather(1, largest) > 0).all()


def test_the_order_of_the_images_changes_no_bit(data):
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
    shuffled = ImageData(
        data.images[order], data.labels[order], data.source, data.shift, data.scale
    )
    for one, other in zip(principal_components(data), principal_components(shuffled), strict=True):
        assert torch.equal(one, other)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4))
def test_all_components_together_give_the_images_back(count, channels, height, width):
    data = correlated_images(count, (channels, height, width))
    mean, components, variances = principal_components(data)
    identity = np.eye(len(mean))
    np.testing.assert_allclose(components @ components.t(), identity, atol=1e-12)
    assert (variances[:-1] >= variances[1:]).all() and (variances >= 0).all()
    again = mean + features(data, len(mean)) @ components
    np.testing.assert_allclose(again, pixels(data), atol=1e-12)


def test_projections_are_uncorrelated_with_the_variances_of_their_components(data):
    variances = principal_components(data).variances[:6]
    y = features(data, 6)
    np.testing.assert_allclose(y.mean(0), np.zeros(6), atol=1e-12)
    np.testing.assert_allclose(y.t() @ y / len(data), torch.diag(variances), atol=1e-12)


def test_what_the_first_components_leave_out_are_the_other_variances(data):
    mean, components, variances = principal_components(data)
    again = mean + features(data, 6) @ components[:6]
    error = np.square(again.numpy() - pixels(data)).sum(1).mean()
    assert error == pytest.approx(float(variances[6:].sum()), rel=1e-10)


def test_pixels_that_never_change_have_no_variance_and_no_part_in_the_others():
    data = correlated_images()
    data.images[:, 0, 2, :] = torch.tensor([0, 77, 254, 255], dtype=torch.uint8)
    _, components, variances = principal_components(data)
    assert (variances[-4:] < 1e-15).all() and (variances[:-4] > 1e-5).all()
    np.testing.assert_allclose(components[:-4].view(-1, 5, 4)[:, 2], np.zeros((16, 4)), atol=1e-12)


def test_images_that_are_all_the_same_have_no_variance_at_all():
    same = ImageData(
        torch.full((7, 1, 2, 2), 131, dtype=torch.uint8), torch.zeros(7, dtype=torch.int64), ""
    )
    assert torch.equal(principal_components(same).variances, torch.zeros(4, dtype=torch.float64))


def test_a_probe_on_all_components_is_the_probe_on_pixels(data):
    x = torch.from_numpy(pixels(data))
    logits = []
    for rows in (x, features(data, 20)):
        fit = fit_logistic(rows, data.labels, data.classes, C=10.0, tolerance=1e-14)
        logits.append(fit.logits(rows))
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-5)


def test_a_single_precision_projection_is_the_double_one_rounded(data):
    single = extract_features(*projection(principal_components(data), 6), data)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single, features(data, 6), atol=1e-5)


@pytest.mark.parametrize("k", [0, 21, -1])
def test_a_number_of_components_that_is_not_there_is_refused(data, k):
    with pytest.raises(DataError, match="1 to 20"):
        projection(principal_components(data), k)


def test_an_empty_data_set_is_refused():
    empty = ImageData(
        torch.zeros(0, 1, 2, 2, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), ""
    )
    with pytest.raises(DataError, match="empty"):
        principal_components(empty)

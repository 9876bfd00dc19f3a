"""Principal components of images, and the projection onto them as a model that needs no training.

    covariance = 1/N sum_n (x_n - mean)(x_n - mean)^T = sum_i variance_i c_i c_i^T
    y_i = c_i . (x - mean),    variance_1 >= variance_2 >= ...

Source: Pearson 1901, On lines and planes of closest fit to systems of points in space.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from data_sets.image_data import DataError, ImageData
from models_fully_local import Activation, Params, lateral_mlp

IMAGES_AT_ONCE = 4096  # bounds the float64 copies


class PrincipalComponents(NamedTuple):
    """All principal components, by decreasing variance; float64.

    mean: [pixels].
    components: [pixels, pixels], orthonormal rows.
    variances: [pixels], divided by N.
    """

    mean: Tensor
    components: Tensor
    variances: Tensor


def principal_components(data: ImageData) -> PrincipalComponents:
    """All principal components of the images, normalised by the data's shift and scale.

    They are computed on the device of the images.
    Sums are taken of bytes and hence exact (up to 300,000 images): a constant pixel has variance
    exactly 0. The sign of a component is such that its largest entry in size is positive. Raises
    DataError if there are no images.
    """
    if not len(data):
        raise DataError("the data set is empty: it has no principal components")
    mean, covariance = _mean_and_covariance(data)
    variances, vectors = torch.linalg.eigh(covariance)
    components = vectors.t().flip(0)
    largest = components.abs().argmax(1, keepdim=True)
    components = components * components.gather(1, largest).sign()
    return PrincipalComponents(mean, components, variances.flip(0).clamp_min(0))


def projection(
    principal: PrincipalComponents, k: int, dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, Params]:
    """The map of images to their first k components: a linear layer and its parameters.

    Outputs [batch, k] are not whitened, they have the variances of the components. With all
    components, a probe with an L2 penalty is therefore the same as on the centred pixels, because
    the penalty is invariant to rotation. Raises DataError unless 1 <= k <= number of components.
    """
    mean, components, _ = principal
    if not 1 <= k <= len(components):
        raise DataError(f"{k} components of {len(components)} pixels: take 1 to {len(components)}")
    w = components[:k]
    model = lateral_mlp(len(mean), [k], Activation("identity"), inhibition="none")
    return model, [{}, {"w": w.to(dtype), "b": (-w @ mean).to(dtype)}]


def _mean_and_covariance(data: ImageData) -> tuple[Tensor, Tensor]:
    """Mean [pixels] and covariance [pixels, pixels] of the normalised images, float64."""
    count, pixels = len(data), math.prod(data.shape)
    total = torch.zeros(pixels, dtype=torch.float64, device=data.images.device)
    products = total.new_zeros(pixels, pixels)
    for images in data.images.split(IMAGES_AT_ONCE):
        x = images.flatten(1).double()
        total += x.sum(0)
        products += x.t() @ x
    covariance = (count * products - torch.outer(total, total)) / (255 * count) ** 2
    if data.scale is not None:
        scale = data.scale.flatten().double()
        covariance /= torch.outer(scale, scale)
    mean = data.normalize((total / (255 * count)).view(data.shape)).flatten()
    return mean, covariance

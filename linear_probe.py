"""Linear probe: how well logistic regression does on a model's features, and the loss through it.

The classifier W, b minimises the objective O of kernels/logistic_regression.py on the training
features. The outer loss L is the mean cross-entropy of some training images, and depends on the
parameters theta of the model directly, and through the classifier:

    dL/dtheta = d_theta L - v^T d_theta (grad_W O),   v = (d^2 O / dW^2)^-1 grad_W L

    envelope   leaves the second term out: at the optimum it vanishes on the loss that the
               classifier was fitted to (envelope theorem), up to penalty and sampling of images
    implicit   keeps it, and holds the images of L out of the fit: the exact gradient of a
               held-out loss (implicit function theorem; Bengio 2000, Gradient-based optimization
               of hyperparameters). Costs a backward pass of the model over all training images.

Cheaper judges of a meta-step see training images alone, drawn anew each time: SampledProbeLoss
fits and judges on the same ones, so that the envelope gradient is exact up to the penalty;
RidgeLoss fits ridge regression on some and judges it on others, attached through the fit:

    W = argmin |Y - mean Y - (F - mean F) W|^2 + penalty |W|^2,   L = mean |Y' - prediction of Y'|^2

with F, Y the features and one-hot labels of the images of the fit, Y' those of the others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from experiment.choices import PROBE_GRADIENTS
from kernels.logistic_regression import (
    LogisticFit,
    NonFiniteFeatures,
    ProbeError,
    fit_logistic,
    in_chunks,
    solve_hessian,
)

ROWS_WITH_GRAPH = 2048  # images whose graph is alive at once in the implicit gradient


@dataclass(frozen=True)
class ProbeResult:
    """loss: scalar, attached to params. Accuracies are fractions in [0, 1]."""

    loss: Tensor
    train_accuracy: float
    test_accuracy: float
    fit: LogisticFit


def linear_probe(
    model,
    params,
    train_data,
    test_data,
    C: float = 1000.0,
    *,
    outer_images: int = 1024,
    probe_gradient: str = "envelope",
    generator: torch.Generator | None = None,
    start: LogisticFit | None = None,
) -> ProbeResult:
    """Fit a classifier on the training features, then judge params through it.

    The loss is the mean cross-entropy of `outer_images` training images (drawn with `generator`;
    evenly spaced ones without it; all of them if there are no more), with the gradient that
    `probe_gradient` names; with implicit the classifier is fitted to the others only.
    Raises ProbeError on wrong input, NonFiniteFeatures on NaN or infinite features.
    """
    _check_gradient(probe_gradient, outer_images, len(train_data))
    implicit = probe_gradient == "implicit"
    index = _draw(len(train_data), outer_images, generator)
    features = extract_features(model, params, train_data)
    test_features = extract_features(model, params, test_data)
    if not bool(torch.isfinite(test_features).all()):
        raise NonFiniteFeatures("test features are not finite; expected finite features")
    fitted = _all_but(index, len(train_data)) if implicit else slice(None)
    seen, labels = features[fitted], train_data.labels[fitted]
    fit = fit_logistic(seen, labels, train_data.classes, C, start=start)
    loss = _outer_loss(model, params, fit, train_data, index)
    if implicit and loss.requires_grad:
        weight, bias = _gradient_by_classifier(fit, features[index], train_data.labels[index])
        direction = solve_hessian(seen, labels, C, fit, weight, bias)
        loss = loss + _through_the_fit(model, params, train_data, fitted, fit, direction)
    return ProbeResult(
        loss=loss,
        train_accuracy=_accuracy(fit, features, train_data.labels),
        test_accuracy=_accuracy(fit, test_features, test_data.labels),
        fit=fit,
    )


class ProbeLoss:
    """`linear_probe` as the outer loss of the meta-loop; its metrics are fractions in [0, 1]."""

    metrics = ("train_accuracy", "test_accuracy")

    def __init__(
        self,
        train_data,
        test_data,
        C: float,
        *,
        outer_images: int = 1024,
        probe_gradient: str = "envelope",
    ) -> None:
        _check_gradient(probe_gradient, outer_images, len(train_data))
        self.data, self.C = (train_data, test_data), C
        self.options = {"outer_images": outer_images, "probe_gradient": probe_gradient}

    def __call__(
        self, model, params, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss attached to params, and the two accuracies."""
        result = linear_probe(
            model, params, *self.data, self.C, generator=generator, **self.options
        )
        return result.loss, {name: getattr(result, name) for name in self.metrics}


class SampledProbeLoss:
    """Cross-entropy of logistic regression on the training images that it is fitted to.

    `images` of them are drawn at each call, all where there are no more; one pass of the model.
    """

    metrics = ("train_accuracy",)

    def __init__(self, data, C: float, *, images: int = 8192) -> None:
        self.data, self.C, self.images = data, C, images

    def __call__(
        self, model, params, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss attached to params, and the accuracy on these images."""
        index = _draw(len(self.data), self.images, generator)
        features, labels = _attached_features(model, params, self.data, index)
        fit = fit_logistic(features.detach(), labels, self.data.classes, self.C)
        logits = fit.logits(features)
        loss = torch.nn.functional.cross_entropy(logits, labels).to(_dtype_and_device(params)[0])
        return loss, {"train_accuracy": _share_of_right(logits, labels)}


class RidgeLoss:
    """Mean squared error of ridge regression on training images that it is not fitted to.

    At each call fit_images and outer_images of them are drawn, all different; one pass of the
    model. penalty: of the sums over the images of the fit, with the intercept left out. Closed
    form, in float64 (as meta-loss: Metz, Maheswaranathan, Cheung, Sohl-Dickstein 2019, ICLR).
    """

    metrics = ("train_accuracy", "held_out_accuracy")

    def __init__(
        self, data, *, fit_images: int = 2000, outer_images: int = 2000, penalty: float = 0.1
    ) -> None:
        if min(fit_images, outer_images) < 1 or fit_images + outer_images > len(data):
            raise ProbeError(
                f"ridge regression on {fit_images} images, judged on {outer_images} others: "
                f"expected at least 1 of each, of {len(data)} training images"
            )
        self.data, self.penalty = data, penalty
        self.sizes = [fit_images, outer_images]

    def __call__(
        self, model, params, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss attached to params, and the accuracies on the fit's images and on others."""
        order = torch.randperm(len(self.data), generator=generator, device="cpu")
        index = order[: sum(self.sizes)]
        features, labels = _attached_features(model, params, self.data, index)
        if not bool(torch.isfinite(features).all()):
            raise NonFiniteFeatures("features are not finite; expected finite features")
        seen, judged = features.double().split(self.sizes)
        seen_labels, judged_labels = labels.split(self.sizes)
        one_hot = torch.nn.functional.one_hot(seen_labels, self.data.classes).double()
        weight, bias = ridge_regression(seen, one_hot, self.penalty)
        outputs = judged @ weight + bias
        targets = torch.nn.functional.one_hot(judged_labels, self.data.classes)
        loss = (outputs - targets).square().sum(1).mean().to(_dtype_and_device(params)[0])
        return loss, {
            "train_accuracy": _share_of_right(seen @ weight + bias, seen_labels),
            "held_out_accuracy": _share_of_right(outputs, judged_labels),
        }


def ridge_regression(features: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight [D, K] and bias [K] of ridge regression, differentiable; see the module's formula.

    features [N, D], targets [N, K]; the matrix that is solved with has the smaller of both sizes.
    """
    mean, mean_target = features.mean(0), targets.mean(0)
    F, Y = features - mean, targets - mean_target
    N, D = F.shape
    gram = F.T @ F if D <= N else F @ F.T
    shifted = gram + penalty * torch.eye(len(gram), dtype=F.dtype, device=F.device)
    try:
        W = torch.linalg.solve(shifted, F.T @ Y) if D <= N else F.T @ torch.linalg.solve(shifted, Y)
    except torch.linalg.LinAlgError as problem:
        raise NonFiniteFeatures("features are too large for ridge regression") from problem
    return W, mean_target - mean @ W


def _attached_features(model, params, data, index: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, D] of the images of `index`, attached to params, in 32 bits or more; labels."""
    dtype, device = _dtype_and_device(params)
    features = model(data.floats(index, dtype=dtype).to(device), params).flatten(1)
    labels = data.labels[index.to(data.labels.device)].to(device)
    return features.to(torch.promote_types(features.dtype, torch.float32)), labels


def _share_of_right(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


def _check_gradient(probe_gradient: str, outer_images: int, available: int) -> None:
    if probe_gradient not in PROBE_GRADIENTS:
        raise ProbeError(f"probe_gradient {probe_gradient!r}; expected envelope or implicit")
    if probe_gradient == "implicit" and outer_images >= available:
        raise ProbeError(
            f"the implicit probe gradient holds out {outer_images} of {available} training images; "
            "expected fewer outer images"
        )


def _outer_loss(model, params, fit: LogisticFit, data, index: Tensor) -> Tensor:
    """Mean cross-entropy of the images of `index`, attached to params but not through the fit."""
    dtype, device = _dtype_and_device(params)
    images = data.floats(index, dtype=dtype).to(device)
    labels = data.labels[index.to(data.labels.device)].to(device)
    logits = fit.logits(model(images, params).flatten(1))
    return torch.nn.functional.cross_entropy(logits, labels).to(dtype)


def _gradient_by_classifier(
    fit: LogisticFit, features: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the mean cross-entropy of features [M, D] by weight and bias."""
    residual = _residual(fit.logits(features), labels) / len(labels)
    return residual.T @ features.double(), residual.sum(0)


def _through_the_fit(
    model, params, data, fitted: Tensor, fit: LogisticFit, direction: tuple[Tensor, Tensor]
) -> Tensor:
    """A zero whose gradient in params is -v^T d_theta (grad_W O), v the given direction.

    With p the probabilities and r = p - onehot of an image of features f, a = v_W f + v_b:

        d (v^T grad_W O) / df = v_W^T r + W^T (p a - p (p^T a))
    """
    dtype, device = _dtype_and_device(params)
    leaves = [{n: t.detach().requires_grad_() for n, t in layer.items()} for layer in params]
    flat = [t for layer in leaves for t in layer.values()]
    total = [torch.zeros_like(t) for t in flat]
    for rows in fitted.split(ROWS_WITH_GRAPH):
        labels = data.labels[rows.to(data.labels.device)].to(device)
        with torch.enable_grad():
            features = model(data.floats(rows, dtype=dtype).to(device), leaves).flatten(1)
        cotangent = _by_features(fit, direction, features.detach(), labels) / -len(fitted)
        gradients = torch.autograd.grad(
            features, flat, cotangent.to(features.dtype), allow_unused=True
        )
        for sum_, part in zip(total, gradients, strict=True):
            if part is not None:
                sum_ += part
    tensors = [t for layer in params for t in layer.values()]
    return sum(((t - t.detach()) * g).sum() for t, g in zip(tensors, total, strict=True))


def _by_features(
    fit: LogisticFit, direction: tuple[Tensor, Tensor], features: Tensor, labels: Tensor
) -> Tensor:
    """The derivatives of v^T grad_W O by features [B, D]; see `_through_the_fit`."""
    logits = fit.logits(features)
    p, r = torch.softmax(logits, 1), _residual(logits, labels)
    a = p * (features.double() @ direction[0].T + direction[1])
    return r @ direction[0] + (a - p * a.sum(1, keepdim=True)) @ fit.weight


def _residual(logits: Tensor, labels: Tensor) -> Tensor:
    """Probabilities [B, classes] less the one-hot labels."""
    labels = labels.to(logits.device)
    return torch.softmax(logits, 1) - torch.nn.functional.one_hot(labels, logits.shape[1])


@torch.no_grad()
def extract_features(model, params, data, *, batch_size: int = 4096) -> Tensor:
    """Features of every image, [N, D], without gradient, `batch_size` images at a time.

    In the dtype of params, or float32 where that has fewer bits.
    """
    if len(data) == 0:
        raise ProbeError("the data set is empty; expected at least one image")
    dtype, device = _dtype_and_device(params)
    features = None
    for first in range(0, len(data), batch_size):
        rows = slice(first, min(first + batch_size, len(data)))
        part = model(data.floats(rows, dtype=dtype).to(device), params).flatten(1)
        if features is None:
            wide = torch.promote_types(part.dtype, torch.float32)
            features = part.new_empty(len(data), part.shape[1], dtype=wide)
        features[rows] = part
    return features


def _accuracy(fit: LogisticFit, features: Tensor, labels: Tensor) -> float:
    labels = labels.to(features.device)
    right = (fit.logits(rows).argmax(1) == true for rows, true in in_chunks(features, labels))
    return sum(int(part.sum()) for part in right) / len(labels)


def _draw(available: int, wanted: int, generator: torch.Generator | None) -> Tensor:
    """Indices of `wanted` of the `available` images, all of them if there are no more."""
    if wanted < 1:
        raise ProbeError(f"outer_images is {wanted}; expected at least 1")
    if wanted >= available:
        return torch.arange(available, device="cpu")
    if generator is None:
        return torch.arange(wanted, device="cpu") * available // wanted
    return torch.randperm(available, generator=generator, device=generator.device)[:wanted].cpu()


def _all_but(index: Tensor, available: int) -> Tensor:
    """The rows 0..available-1 that are not in `index`, in order."""
    kept = torch.ones(available, dtype=torch.bool, device=index.device)
    kept[index] = False
    return kept.nonzero()[:, 0]


def _dtype_and_device(params) -> tuple[torch.dtype, torch.device]:
    """Those of the first tensor in params; torch's defaults for a model without any."""
    for layer in params:
        for tensor in layer.values():
            return tensor.dtype, tensor.device
    return torch.get_default_dtype(), torch.device("cpu")

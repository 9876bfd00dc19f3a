"""Linear probe: the accuracy of logistic regression on a model's features, and a loss through it.

The classifier W, b minimises the objective O of kernels/logistic_regression.py on the training
features. The outer loss L is the mean cross-entropy of some training images. It depends on the
parameters theta of the model directly and through the classifier:

    dL/dtheta = d_theta L - v^T d_theta (grad_W O),   v = (d^2 O / dW^2)^-1 grad_W L

    envelope   omits the second term: at the optimum it vanishes for the loss that the classifier
               was fitted to (envelope theorem), up to the penalty and the sampling of images
    implicit   includes it, and excludes the images of L from the fit: the exact gradient of a
               held-out loss (implicit function theorem; Bengio 2000, Gradient-based optimization
               of hyperparameters). Costs a backward pass of the model over all training images.

Two cheaper losses for meta-steps use only training images, drawn anew each time. SampledProbeLoss
fits and judges on the same images, so that the envelope gradient is exact up to the penalty.
RidgeLoss fits ridge regression to some images, judges it on others, and is differentiated through
the fit:

    W = argmin |Y - mean Y - (F - mean F) W|^2 + penalty |W|^2,   L = mean |Y' - prediction of Y'|^2

with F, Y the features and one-hot labels of the images of the fit, Y' the labels of the others.

For the tasks of a meta-step that are computed together, each loss is also one of all tasks at once.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_sets.counted_numbers import drawn_key, on_device, permutations
from experiment.choices import HOST, PROBE_GRADIENTS
from kernels.logistic_regression import (
    LogisticFit,
    NonFiniteFeatures,
    ProbeError,
    fit_logistic,
    in_chunks,
    solve_hessian,
)
from kernels.logistic_tasks import LogisticFits, fit_logistic_tasks

ROWS_WITH_GRAPH = 2048  # the most images whose graph exists at a time in the implicit gradient


@dataclass(frozen=True)
class ProbeResult:
    """The result of `linear_probe`.

    loss: a scalar, attached to params.
    train_accuracy, test_accuracy: fractions in [0, 1].
    fit: the classifier.
    """

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
    random_numbers: str = HOST,
    start: LogisticFit | None = None,
) -> ProbeResult:
    """Fit a classifier to the training features, and judge params by it.

    Raises ProbeError for wrong input, NonFiniteFeatures for features that are nan or infinite.

    train_data, test_data: ImageData.
    C: inverse penalty of the classifier.
    outer_images: the loss is the mean cross-entropy of so many training images, or of all if there
        are no more.
    probe_gradient: "envelope" or "implicit"; with the latter the classifier is fitted to the other
        training images only.
    generator: draws these images; None: they are evenly spaced.
    random_numbers: host: so the generator does; device: it draws only a key of counted numbers.
    start: a classifier from which the fit starts.
    """
    _check_gradient(probe_gradient, outer_images, len(train_data))
    implicit = probe_gradient == "implicit"
    (index,) = _draw_for_tasks(train_data, outer_images, [generator], random_numbers)
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
    """`linear_probe` as the outer loss of the meta-loop; metrics are fractions in [0, 1]."""

    metrics = ("train_accuracy", "test_accuracy")

    def __init__(
        self,
        train_data,
        test_data,
        C: float,
        *,
        outer_images: int = 1024,
        probe_gradient: str = "envelope",
        random_numbers: str = HOST,
    ) -> None:
        _check_gradient(probe_gradient, outer_images, len(train_data))
        self.data, self.C = (train_data, test_data), C
        self.options = {
            "outer_images": outer_images,
            "probe_gradient": probe_gradient,
            "random_numbers": random_numbers,
        }

    def __call__(
        self, model, params, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss attached to params, and the two accuracies."""
        result = linear_probe(
            model, params, *self.data, self.C, generator=generator, **self.options
        )
        return result.loss, {name: getattr(result, name) for name in self.metrics}

    @property
    def of_tasks(self) -> Callable | None:
        """The losses of several tasks at once, with the envelope gradient; else None."""
        return self._of_tasks if self.options["probe_gradient"] == "envelope" else None

    def _of_tasks(
        self, model, params, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, list[dict[str, float]]]:
        """The losses [tasks] of params [tasks, ...], and the accuracies of each."""
        train_data, test_data = self.data
        features, labels = _all_features_of_tasks(model, params, train_data, len(generators))
        test_features, test_labels = _all_features_of_tasks(
            model, params, test_data, len(generators)
        )
        if not bool(torch.isfinite(test_features).all()):
            raise NonFiniteFeatures("test features are not finite; expected finite features")
        fits = fit_logistic_tasks(features, labels, train_data.classes, self.C)
        wanted = self.options["outer_images"]
        indices = _draw_for_tasks(train_data, wanted, generators, self.options["random_numbers"])
        losses = _entropies(fits, *_features_of_tasks(model, params, train_data, indices))
        return losses.to(_dtype_and_device(params)[0]), _rows({
            "train_accuracy": _shares_of_right(fits.logits(features), labels),
            "test_accuracy": _shares_of_right(fits.logits(test_features), test_labels),
        })  # fmt: skip


class SampledProbeLoss:
    """Mean cross-entropy of logistic regression on the training images that it is fitted to.

    Each call draws `images` training images, or takes all if there are no more, and makes one
    forward pass of the model.
    """

    metrics = ("train_accuracy",)

    def __init__(self, data, C: float, *, images: int = 8192, random_numbers: str = HOST) -> None:
        self.data, self.C, self.images, self.random_numbers = data, C, images, random_numbers

    def __call__(
        self, model, params, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss attached to params, and the accuracy on these images."""
        (index,) = _draw_for_tasks(self.data, self.images, [generator], self.random_numbers)
        features, labels = _attached_features(model, params, self.data, index)
        fit = fit_logistic(features.detach(), labels, self.data.classes, self.C)
        logits = fit.logits(features)
        loss = torch.nn.functional.cross_entropy(logits, labels).to(_dtype_and_device(params)[0])
        return loss, {"train_accuracy": _share_of_right(logits, labels)}

    def of_tasks(
        self, model, params, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, list[dict[str, float]]]:
        """The losses [tasks] of params [tasks, ...], and the accuracy of each."""
        indices = _draw_for_tasks(self.data, self.images, generators, self.random_numbers)
        features, labels = _features_of_tasks(model, params, self.data, indices)
        fits = fit_logistic_tasks(features.detach(), labels, self.data.classes, self.C)
        losses = _entropies(fits, features, labels).to(_dtype_and_device(params)[0])
        right = _shares_of_right(fits.logits(features), labels)
        return losses, _rows({"train_accuracy": right})


class FunctionLoss:
    """The loss that a function of your own gives to the parameters, on training images.

    Each call draws `images` training images, or takes all if there are no more, and calls
    function(model, params, x, labels) with x [images, C, H, W] and labels [images]. Raises
    ProbeError if what comes back is not a scalar that depends on params.
    """

    metrics = ()

    def __init__(
        self,
        function: Callable[..., Tensor],
        data,
        *,
        images: int = 4096,
        random_numbers: str = HOST,
    ) -> None:
        try:
            inspect.signature(function).bind(*range(4))
        except (TypeError, ValueError) as error:
            name = getattr(function, "__name__", repr(function))
            raise ProbeError(f"{name:.60} must take (model, params, images, labels)") from error
        self.function, self.data, self.images = function, data, images
        self.random_numbers = random_numbers

    def __call__(
        self, model, params, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """The function's loss, and no numbers beside it."""
        (index,) = _draw_for_tasks(self.data, self.images, [generator], self.random_numbers)
        x = self.data.floats(index, _dtype_and_device(params)[0])
        labels = self.data.labels.index_select(0, index.to(self.data.labels.device))
        loss = self.function(model, params, x, labels)
        if not (isinstance(loss, Tensor) and loss.shape == () and loss.requires_grad):
            name = getattr(self.function, "__name__", "the function")
            raise ProbeError(f"{name} returned {loss!r:.60}; a scalar that depends on params is "
                             "wanted")  # fmt: skip
        return loss, {}


class RidgeLoss:
    """Squared error of ridge regression on training images that it is not fitted to.

    The error is summed over the classes and averaged over the images. Each call draws fit_images
    and outer_images different images and makes one forward pass of the model; the fit is in closed
    form, in float64. As a meta-loss: Metz, Maheswaranathan, Cheung, Sohl-Dickstein 2019, ICLR.
    Raises ProbeError if there are too few images.

    penalty: relative to sums over the images of the fit; the intercept is not penalised.
    """

    metrics = ("train_accuracy", "held_out_accuracy")

    def __init__(
        self,
        data,
        *,
        fit_images: int = 2000,
        outer_images: int = 2000,
        penalty: float = 0.1,
        random_numbers: str = HOST,
    ) -> None:
        if min(fit_images, outer_images) < 1 or fit_images + outer_images > len(data):
            raise ProbeError(
                f"ridge regression on {fit_images} images, judged on {outer_images} others: "
                f"expected at least 1 of each, of {len(data)} training images"
            )
        self.data, self.penalty, self.random_numbers = data, penalty, random_numbers
        self.sizes = [fit_images, outer_images]

    def __call__(
        self, model, params, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss attached to params, and the accuracies on images of the fit and on others."""
        (index,) = self._images_of_tasks([generator])
        features, labels = _attached_features(model, params, self.data, index)
        if not bool(torch.isfinite(features).all()):
            raise NonFiniteFeatures("features are not finite; expected finite features")
        parts = features.double().split(self.sizes)
        loss, numbers = ridge_error(
            *parts, *labels.split(self.sizes), self.data.classes, self.penalty
        )
        return loss.to(_dtype_and_device(params)[0]), numbers

    def of_tasks(
        self, model, params, generators: Sequence[torch.Generator]
    ) -> tuple[Tensor, list[dict[str, float]]]:
        """The losses [tasks] of params [tasks, ...], and the accuracies of each."""
        indices = self._images_of_tasks(generators)
        features, labels = _features_of_tasks(model, params, self.data, indices)
        if not bool(torch.isfinite(features).all()):
            raise NonFiniteFeatures("features are not finite; expected finite features")
        seen, judged = features.double().split(self.sizes, 1)
        seen_labels, judged_labels = labels.split(self.sizes, 1)
        one_hot = torch.nn.functional.one_hot(seen_labels, self.data.classes).double()
        weight, bias = ridge_regression(seen, one_hot, self.penalty)
        outputs = judged @ weight + bias.unsqueeze(1)
        targets = torch.nn.functional.one_hot(judged_labels, self.data.classes)
        losses = (outputs - targets).square().sum(2).mean(1)
        of_fit = seen @ weight + bias.unsqueeze(1)
        return losses.to(_dtype_and_device(params)[0]), _rows({
            "train_accuracy": _shares_of_right(of_fit, seen_labels),
            "held_out_accuracy": _shares_of_right(outputs, judged_labels),
        })  # fmt: skip

    def _images_of_tasks(self, generators: Sequence[torch.Generator]) -> Tensor:
        """The images of the fit and of the loss for each generator, [tasks, images]."""
        count, wanted = len(self.data), sum(self.sizes)
        if self.random_numbers != HOST:
            return _counted_orders(self.data, generators)[:, :wanted]
        orders = (torch.randperm(count, generator=g, device="cpu") for g in generators)
        return torch.stack([order[:wanted] for order in orders])


def ridge_error(
    seen: Tensor,
    judged: Tensor,
    seen_labels: Tensor,
    judged_labels: Tensor,
    classes: int,
    penalty: float,
) -> tuple[Tensor, dict[str, float]]:
    """Squared error of ridge regression fitted to `seen` on `judged`, and the accuracies on both.

    The error is summed over the classes and averaged over the rows; it is differentiable in both.
    Raises NonFiniteFeatures if the system can't be solved.

    seen, judged: features [N, D] and [M, D], float64.
    seen_labels, judged_labels: int64 [N] and [M], below `classes`.
    """
    one_hot = torch.nn.functional.one_hot(seen_labels, classes).double()
    weight, bias = ridge_regression(seen, one_hot, penalty)
    outputs = judged @ weight + bias
    targets = torch.nn.functional.one_hot(judged_labels, classes)
    return (outputs - targets).square().sum(1).mean(), {
        "train_accuracy": _share_of_right(seen @ weight + bias, seen_labels),
        "held_out_accuracy": _share_of_right(outputs, judged_labels),
    }


def ridge_regression(features: Tensor, targets: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weight [D, K] and bias [K] of ridge regression, differentiable; see the module's formula.

    The linear system is of size min(N, D). Raises NonFiniteFeatures if it can't be solved.

    features: [N, D]; of several tasks [tasks, N, D], and so have all others that dimension.
    targets: [N, K].
    """
    mean, mean_target = features.mean(-2, keepdim=True), targets.mean(-2, keepdim=True)
    F, Y = features - mean, targets - mean_target
    N, D = F.shape[-2:]
    gram = F.mT @ F if D <= N else F @ F.mT
    shifted = gram + penalty * torch.eye(min(N, D), dtype=F.dtype, device=F.device)
    try:
        if D <= N:
            W = torch.linalg.solve(shifted, F.mT @ Y)
        else:
            W = F.mT @ torch.linalg.solve(shifted, Y)
    except torch.linalg.LinAlgError as problem:
        raise NonFiniteFeatures("features are too large for ridge regression") from problem
    return W, (mean_target - mean @ W).squeeze(-2)


def _features_of_tasks(model, params, data, indices: Tensor) -> tuple[Tensor, Tensor]:
    """`_attached_features` of each task, [tasks, n, D] and [tasks, n], of images [tasks, n]."""
    dtype, device = _dtype_and_device(params)
    rows = indices.to(data.images.device)
    images = data.floats(rows.flatten(), dtype=dtype).unflatten(0, rows.shape).to(device)
    features = model(images, params).flatten(2)
    labels = data.labels[rows.to(data.labels.device)].to(device)
    return features.to(torch.promote_types(features.dtype, torch.float32)), labels


@torch.no_grad()
def _all_features_of_tasks(model, params, data, tasks: int) -> tuple[Tensor, Tensor]:
    """`extract_features` of each task, [tasks, N, D], and labels [tasks, N]."""
    dtype, device = _dtype_and_device(params)
    parts = []
    for rows in torch.arange(len(data), device="cpu").split(ROWS_WITH_GRAPH):
        images = data.floats(slice(int(rows[0]), int(rows[-1]) + 1), dtype=dtype).to(device)
        parts.append(model(images.expand(tasks, *images.shape), params).flatten(2))
    features = torch.cat(parts, 1)
    wide = torch.promote_types(features.dtype, torch.float32)
    return features.to(wide), data.labels.to(device).expand(tasks, -1)


def _entropies(fits: LogisticFits, features: Tensor, labels: Tensor) -> Tensor:
    """The mean cross-entropy of each task, [tasks], attached to the features."""
    logits = fits.logits(features).mT
    return torch.nn.functional.cross_entropy(logits, labels, reduction="none").mean(1)


def _attached_features(model, params, data, index: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, D] of the images `index`, attached to params, at least float32; their labels."""
    dtype, device = _dtype_and_device(params)
    features = model(data.floats(index, dtype=dtype).to(device), params).flatten(1)
    labels = data.labels[index.to(data.labels.device)].to(device)
    return features.to(torch.promote_types(features.dtype, torch.float32)), labels


def _share_of_right(logits: Tensor, labels: Tensor) -> float:
    return (logits.argmax(1) == labels).double().mean().item()


def _shares_of_right(logits: Tensor, labels: Tensor) -> list[float]:
    """The same for each task, of logits [tasks, B, classes] and labels [tasks, B]."""
    return (logits.argmax(2) == labels).double().mean(1).tolist()


def _rows(numbers: dict[str, list[float]]) -> list[dict[str, float]]:
    """The numbers of each task, from lists with one for each."""
    return [dict(zip(numbers, row, strict=True)) for row in zip(*numbers.values(), strict=True)]


def _check_gradient(probe_gradient: str, outer_images: int, available: int) -> None:
    if probe_gradient not in PROBE_GRADIENTS:
        raise ProbeError(f"probe_gradient {probe_gradient!r}; expected envelope or implicit")
    if probe_gradient == "implicit" and outer_images >= available:
        raise ProbeError(
            f"the implicit probe gradient holds out {outer_images} of {available} training images; "
            "expected fewer outer images"
        )


def _outer_loss(model, params, fit: LogisticFit, data, index: Tensor) -> Tensor:
    """Mean cross-entropy of the images `index`, attached to params but not through the fit."""
    dtype, device = _dtype_and_device(params)
    images = data.floats(index, dtype=dtype).to(device)
    labels = data.labels[index.to(data.labels.device)].to(device)
    logits = fit.logits(model(images, params).flatten(1))
    return torch.nn.functional.cross_entropy(logits, labels).to(dtype)


def _gradient_by_classifier(
    fit: LogisticFit, features: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of the mean cross-entropy of features [M, D] by weight and bias."""
    residual = _residual(fit.logits(features), labels) / len(labels)
    return residual.T @ features.double(), residual.sum(0)


def _through_the_fit(
    model, params, data, fitted: Tensor, fit: LogisticFit, direction: tuple[Tensor, Tensor]
) -> Tensor:
    """A zero whose gradient by params is -v^T d_theta (grad_W O), with v = `direction`.

    For an image with features f, probabilities p, r = p - onehot and a = v_W f + v_b,

        d (v^T grad_W O) / df = v_W^T r + W^T (p a - p (p^T a))

    fitted: the indices of the images that the classifier was fitted to.
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
    """The probabilities [B, classes] minus the one-hot labels."""
    labels = labels.to(logits.device)
    return torch.softmax(logits, 1) - torch.nn.functional.one_hot(labels, logits.shape[1])


@torch.no_grad()
def extract_features(model, params, data, *, batch_size: int = 4096) -> Tensor:
    """The features of all images, [N, D], without gradient, in chunks of `batch_size` images.

    Their dtype is that of params, or float32 if that has fewer bits. Raises ProbeError if there are
    no images.
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
    """The indices of `wanted` of the `available` images, or of all if there are no more.

    They are evenly spaced without a generator. Raises ProbeError if wanted < 1.
    """
    if wanted < 1:
        raise ProbeError(f"outer_images is {wanted}; expected at least 1")
    if wanted >= available:
        return torch.arange(available, device="cpu")
    if generator is None:
        return torch.arange(wanted, device="cpu") * available // wanted
    return torch.randperm(available, generator=generator, device=generator.device)[:wanted].cpu()


def _draw_for_tasks(
    data, wanted: int, generators: Sequence[torch.Generator | None], random_numbers: str
) -> Tensor:
    """The indices that `_draw` gives for each generator, or as many by its key, [tasks, n]."""
    if random_numbers == HOST or None in generators or not 1 <= wanted < len(data):
        return torch.stack([_draw(len(data), wanted, generator) for generator in generators])
    return _counted_orders(data, generators)[:, :wanted]


def _counted_orders(data, generators: Sequence[torch.Generator]) -> Tensor:
    """A random order of the images for each generator's key, int64 [tasks, N] on their device."""
    keys = on_device([drawn_key(generator) for generator in generators], data.images.device)
    return permutations(keys, len(data))


def _all_but(index: Tensor, available: int) -> Tensor:
    """The rows 0..available-1 that are not in `index`, in order."""
    kept = torch.ones(available, dtype=torch.bool, device=index.device)
    kept[index] = False
    return kept.nonzero()[:, 0]


def _dtype_and_device(params) -> tuple[torch.dtype, torch.device]:
    """Those of the first tensor in params; without one, torch's default dtype and the CPU."""
    for layer in params:
        for tensor in layer.values():
            return tensor.dtype, tensor.device
    return torch.get_default_dtype(), torch.device("cpu")

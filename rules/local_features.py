"""Features learned by a local rule without labels, as a scikit-learn transformer.

    from rules import LocalFeatures
    features = LocalFeatures(rule="mnist32", units=32, steps=250).fit(X).transform(X)

X is an array or tensor: a table [n, features], or images [n, H, W], [n, C, H, W] or, with 1 or 3
channels, [n, H, W, C]. Bytes are divided by 255. Floats of images must be within 0 to 1. A table of
such floats is treated like pixels; any other is standardised, with standard deviation 0.25, about
that of a pixel, because rules are learned on images. A rule for pairs gets views of images as its
file says. The views of a row of a table have noise, and a share of its values (the file's, or up to
half) is replaced by the columns' means.
"""

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_array, check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Generator, Tensor

from data_sets.image_data import ImageData, batch_indices
from data_sets.own_images import channels_are_last
from data_sets.views import Views
from experiment.seeds import seeded_generator
from experiment.view_strengths import MASKS, NONE, ViewStrengths
from initializers import fixed_initializer
from learning_rules import LearningRule, PerLayerRule
from rules.classical import CLASSICAL
from rules.layerwise import train_layerwise
from rules.zoo import Recipe, load_zoo

AT_ONCE = 4096  # rows whose features are computed together
COLUMN_SPREAD = 0.25  # standard deviation of a standardised column, about that of a pixel
ROW_MASK, ROW_NOISE = (0.0, 0.5), 0.1  # for tables, if a rule's file has no masks or no noise
DTYPES = (np.float64, np.float32, np.uint8)
START, BATCHES = range(2)  # the use of random numbers, after the seed in their keys


class LocalFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """The activities of units trained by a local rule, layer after layer.

    Parameters:
        rule: the name of a rule in the zoo; the path of such a file, or of a run of main.py, which
            has one; a classical rule ("oja", "sanger", "instar", "foldiak" or "krotov_hopfield"),
            each in its own network; or a LearningRule, for units sigmoid(4 s) with initial weights
            of spread 0.167.
        units: the number of units, or a tuple of numbers for layers trained one after the other.
        steps: the number of updates of each layer.
        batch_size: the number of rows in each update, at most all; None for the rule's own.
        rate: the learning rate of a classical rule; None for one that suits images of digits.
        image_shape: (H, W), (C, H, W) or (H, W, C), if the rows of X are images; None for tables.
        random_state: with an int, every fit gives the same features.

    Attributes:
        recipe_: the rule and its network, from the rule's file.
        model_, params_: the network and its parameters.
        shape_: the shape of one input.
        shift_, scale_: inputs are (X - shift_) / scale_, bytes divided by 255 first.
    """

    def __init__(
        self,
        rule: str | Path | LearningRule = "mnist32",
        units: int | tuple[int, ...] = 32,
        *,
        steps: int = 250,
        batch_size: int | None = None,
        rate: float | None = None,
        image_shape: tuple[int, ...] | None = None,
        random_state: int | np.random.RandomState | None = 0,
    ) -> None:
        self.rule = rule
        self.units = units
        self.steps = steps
        self.batch_size = batch_size
        self.rate = rate
        self.image_shape = image_shape
        self.random_state = random_state

    def fit(self, X, y=None) -> "LocalFeatures":
        """Train the units on X; y is ignored.

        Raises ValueError for wrong input and parameters, and NonFiniteError, a FloatingPointError,
        if the parameters do not stay finite.
        """
        units = _whole_numbers("units", self.units)
        (steps,) = _whole_numbers("steps", self.steps)
        self.recipe_ = recipe_of(self.rule, self.rate)
        self._given_shape = None  # of images that are no table
        X = self._checked(X, reset=True)
        self._take_scale(X)
        x = self._scaled(X)
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        channels = (1,) * (3 - len(self.shape_)) + self.shape_
        self.model_ = self.recipe_.network(channels, units)
        layers = len(self.recipe_.conv) + len(units)
        rules = [copy.deepcopy(rule).to(x.dtype) for rule in self.recipe_.rules(layers)]
        initializer = fixed_initializer(self.recipe_.initial).to(x.dtype)
        self.params_ = train_layerwise(
            self.model_,
            initializer(self.model_, seeded_generator(seed, START)),
            self._batches(X, x, seeded_generator(seed, BATCHES)),
            rules,
            [steps] * layers,
            lambda: x.split(AT_ONCE),
        )
        self._n_features_out = units[-1]
        return self

    @torch.no_grad()
    def transform(self, X) -> np.ndarray:
        """The features of X, [n, units of the last layer]; float64 if X is, else float32."""
        check_is_fitted(self)
        X = self._checked(X, reset=False)
        dtype = torch.float64 if X.dtype == np.float64 else torch.float32
        params = [{name: t.to(dtype) for name, t in layer.items()} for layer in self.params_]
        parts = self._scaled(X, dtype).split(AT_ONCE)
        return torch.cat([self.model_(x, params).flatten(1) for x in parts]).numpy()

    # ---- inputs ----

    def _checked(self, X, *, reset: bool) -> np.ndarray:
        """X as an array of one of DTYPES, [n, features] or images [n, C, H, W]."""
        X = _as_array(X) if isinstance(X, Tensor) else X
        if getattr(X, "ndim", 2) <= 2:
            X = validate_data(self, X, dtype=DTYPES, reset=reset)
            shape = self.image_shape
            if shape is None and not reset:
                shape = self._given_shape
            return X if shape is None else _as_images(X, (len(X), *shape))
        X = check_array(X, dtype=DTYPES, ensure_2d=False, allow_nd=True, estimator=self)
        given, X = X.shape[1:], _as_images(X, X.shape)
        if reset:
            self.n_features_in_, self._given_shape = int(np.prod(given)), given
        elif X.shape[1:] != self.shape_:
            raise ValueError(f"X has images {X.shape[1:]}, expected {self.shape_}, as in fit")
        return X

    def _take_scale(self, X: np.ndarray) -> None:
        """Set shape_, shift_ and scale_ from the training data."""
        self.shape_ = X.shape[1:]
        self.shift_, self.scale_ = np.zeros(()), np.ones(())
        in_range = X.dtype == np.uint8 or (X.min() >= 0 and X.max() <= 1)
        if not in_range:
            if len(self.shape_) == 3:
                raise ValueError(f"images are uint8 or within 0 to 1, not {X.min()} to {X.max()}")
            self.shift_, self.scale_ = X.mean(0), X.std(0)
            constant = self.scale_ <= 10 * np.finfo(X.dtype).eps * np.abs(self.shift_)
            self.scale_ = np.where(constant, np.inf, self.scale_) / COLUMN_SPREAD
        elif self.recipe_.centring == "standardised":
            unit = 255 if X.dtype == np.uint8 else 1
            self.shift_, self.scale_ = X.mean(0) / unit, X.std(0) / unit
            self.scale_ = np.where(self.scale_ == 0, 1, self.scale_)

    def _scaled(self, X: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
        """(X - shift_) / scale_ as a tensor, bytes divided by 255 first."""
        X = X / 255.0 if X.dtype == np.uint8 else X
        return torch.from_numpy(np.asarray((X - self.shift_) / self.scale_)).to(dtype)

    # ---- batches ----

    def _batches(self, X: np.ndarray, x: Tensor, generator: Generator) -> Iterator:
        """Endless batches of x, which is X scaled, or pairs of views if the rule takes pairs."""
        (batch_size,) = _whole_numbers("batch_size", self.batch_size or self.recipe_.batch_size)
        batch_size = min(batch_size, len(x))
        if getattr(self.recipe_.rule.rules[0], "views", 1) == 1:
            epochs = (batch_indices(x, batch_size, generator) for _ in itertools.count())
            return (x[index] for index in itertools.chain.from_iterable(epochs))
        strengths = replace(self.recipe_.views or ViewStrengths(), center=False)
        if x.dim() == 2:
            return Views(x, batch_size, for_rows(strengths))(generator)
        pixels = X if X.dtype == np.uint8 else (255 * X).round().astype(np.uint8)
        images = ImageData(
            torch.from_numpy(np.ascontiguousarray(pixels)),
            torch.zeros(len(X), dtype=torch.int64),
            "an array",
            *(torch.tensor(t, dtype=torch.float32) for t in (self.shift_, self.scale_)),
        )
        return Views(images, batch_size, strengths)(generator)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags


def recipe_of(rule: str | Path | LearningRule, rate: float | None = None) -> Recipe:
    """The recipe for the parameters `rule` and `rate` of LocalFeatures; raises ValueError."""
    if isinstance(rule, str) and rule in CLASSICAL:
        chosen = CLASSICAL[rule]
        made = chosen.make_rule(chosen.rate if rate is None else rate)
        network = {"inhibition": "lateral", **chosen.network}
        return Recipe(PerLayerRule([made]), **network, initial=chosen.start)
    if rate is not None:
        raise ValueError(f"rate is of {', '.join(CLASSICAL)}, not of the rule {rule!r}")
    if isinstance(rule, LearningRule):
        layers = rule if isinstance(rule, PerLayerRule) else PerLayerRule([rule])
        return Recipe(layers, initial={"spread_w": 0.167})
    return load_zoo(rule).recipe


def for_rows(strengths: ViewStrengths) -> ViewStrengths:
    """The views of rows of a table that take the place of a rule's views of images."""
    if strengths.kind in (MASKS, NONE):
        return strengths
    mask = strengths.mask if strengths.masks else ROW_MASK
    return replace(strengths, kind=MASKS, mask=mask, noise=strengths.noise or ROW_NOISE)


def _as_array(X: Tensor) -> np.ndarray:
    """A tensor as an array; raises ValueError for a kind that has none."""
    try:
        return (X.float() if X.dtype == torch.bfloat16 else X).numpy(force=True)
    except (TypeError, RuntimeError) as problem:
        first = str(problem).splitlines()[0]
        raise ValueError(f"X is a tensor that is no array: {first}") from problem


def _as_images(X: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """X as images [n, C, H, W], given their shape [n, H, W], [n, C, H, W] or [n, H, W, C]."""
    shape = tuple(shape)
    if len(shape) not in (3, 4) or min(shape) < 1 or int(np.prod(shape)) != X.size:
        raise ValueError(f"X of shape {X.shape} is no table and no images {shape}, [n, (C,) H, W]")
    if len(shape) == 3:
        return X.reshape(shape[0], 1, *shape[1:])
    X = X.reshape(shape)
    return np.moveaxis(X, 3, 1) if channels_are_last(shape) else X


def _whole_numbers(name: str, value: Any) -> tuple[int, ...]:
    """One whole number or several as a tuple; raises ValueError unless all are at least 1."""
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    for number in values:
        if not isinstance(number, Integral) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{name} is {value!r}, expected whole numbers of at least 1")
    return tuple(map(int, values))

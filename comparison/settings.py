"""Settings of the references that rules are compared with; importing it does not load torch."""

from dataclasses import dataclass

from experiment.settings import setting


@dataclass(frozen=True)
class VICRegSettings:
    """How VICReg trains a network, and the weights of its loss; see comparison/vicreg.py."""

    epochs: int = setting(100, "passes over the training images", "nonnegative")
    lr: float = setting(1e-3, "learning rate (AdamW)", "positive")
    weight_decay: float = setting(
        0.01, "weight decay of AdamW, multiplied by the learning rate", "nonnegative"
    )
    batch_size: int = setting(1024, "images in a batch, with two views of each", "positive")
    invariance: float = setting(
        250.0, "weight of the mean squared difference of the views", "nonnegative",
        metavar="WEIGHT",
    )  # fmt: skip
    variance: float = setting(
        25.0, "weight of standard deviations below the hinge", "nonnegative", metavar="WEIGHT"
    )
    covariance: float = setting(
        1000.0, "weight of the squared covariances of different features", "nonnegative",
        metavar="WEIGHT",
    )  # fmt: skip
    hinge: float = setting(0.1, "standard deviation of features that is not penalized", "positive")

"""Lists of choices that parsers have without torch name what there is."""

from comparison.choices import CLASSICAL_NAMES, REFERENCES
from comparison.rule_comparison import reference_methods
from experiment.choices import META_OPTIMIZERS, METHODS
from experiment.data_names import DATASETS
from hypgraddesc import OPTIMIZERS
from meta_gradients import METHODS as WAYS
from mnist_datasets import _COLLECTIONS
from rules.classical import CLASSICAL


def test_lists_of_choices_name_what_there_is():
    assert (*WAYS,) == METHODS and (*OPTIMIZERS,) == META_OPTIMIZERS
    assert (*CLASSICAL,) == CLASSICAL_NAMES and (*reference_methods(None),) == REFERENCES
    assert {*_COLLECTIONS, "cifar10", "mnist5k"} == {*DATASETS}

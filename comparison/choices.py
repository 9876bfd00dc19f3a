"""Names of methods and problems to compare; importing it does not load torch."""

from data_sets.choices import TABLES

CLASSICAL_NAMES = ("oja", "sanger", "instar", "krotov_hopfield", "foldiak")
# Other methods, of evaluate.py
REFERENCES = ("random", "pca", "vicreg", "class_pairs", "supervised")

# The methods that main.py reports beside a learned rule: references.py
BESIDE = ("random", "pca", "oja", "sanger", "latent-predictive")

# The problems of tune_one_pass.py and their networks
IMAGES = ("mnist", "fashion", "mnist5k", "cifar10")
TOYS = ("quadratic", "two_weights")
OWN_VALIDATION = ("ptb", *TOYS)  # problems whose validation samples are not held out
PROBLEMS = (*TABLES, *IMAGES, "ptb", *TOYS)
MODELS = ("mlp", "mlp_batch_norm", "resnet18", "resnet18_unmodified", "lstm", "toy")
PERCEPTRONS = ("mlp", "mlp_batch_norm")
HIDDEN_SIZES = {"mlp": (50,), "mlp_batch_norm": (50,), "lstm": (650, 650)}  # as published
ACTIVATIONS = ("ReLU", "Tanh", "Sigmoid", "ELU", "GELU", "SiLU", "Softplus", "LeakyReLU")
STANDARDISED = ("pixels", "channels")  # by the mean and deviation of each

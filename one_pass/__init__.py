"""SGD that tunes its own hyperparameters in one pass, and the objectives it is made for."""

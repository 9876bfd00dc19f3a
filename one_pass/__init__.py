"""SGD that tunes its own hyperparameters in one pass: objectives, compiled loops, the tuning itself."""

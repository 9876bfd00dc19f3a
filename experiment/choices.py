"""What there is to choose from in the main job, for parsers: no torch is loaded with it."""

MEMORY = ("fit", "keep", "segments", "recompute")  # what is kept for the backward pass: train.py
# linear_probe.py: ProbeLoss, SampledProbeLoss, RidgeLoss; the gradient of the first
PROBES = ("logistic", "sampled", "ridge")
PROBE_GRADIENTS = ("envelope", "implicit")
WITH_LATERAL_WEIGHTS = ("lateral", "equilibrium")
INHIBITION = (*WITH_LATERAL_WEIGHTS, "none", "l1", "l2")  # models_fully_local.py
PRODUCTS = ("float32", "tf32", "bfloat16")  # precision.py

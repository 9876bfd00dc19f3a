"""What there is to choose from in the main job, for parsers: no torch is loaded with it."""

# models_fully_local.py
WITH_LATERAL_WEIGHTS = ("lateral", "equilibrium")
NORMS = {"l1": 1, "l2": 2, "l1_image": 1, "l2_image": 2}  # order of each
INHIBITION = (*WITH_LATERAL_WEIGHTS, "none", *NORMS)

# train.py: what is kept for the backward pass; experiment/precision.py
MEMORY = ("fit", "keep", "segments", "recompute")
PRODUCTS = ("float32", "tf32", "bfloat16")

# linear_probe.py: ProbeLoss, SampledProbeLoss, RidgeLoss; the gradient of the first
PROBES = ("logistic", "sampled", "ridge")
PROBE_GRADIENTS = ("envelope", "implicit")

# meta_gradients.py; hypgraddesc.py
METHODS = ("reverse", "truncated", "lookback", "implicit", "forward", "es", "pes")
META_OPTIMIZERS = ("adam", "rmsprop")
DECAYS = ("none", "cosine")
NONFINITE = ("skip", "stop")

"""The named options of the main job, for modules and parsers; importing it does not load torch."""

# models_fully_local.py
WITH_LATERAL_WEIGHTS = ("lateral", "equilibrium")
NORMS = {"l1": 1, "l2": 2, "l1_image": 1, "l2_image": 2}  # order of each
INHIBITION = (*WITH_LATERAL_WEIGHTS, "none", *NORMS)

# Memory policies of train.py; precisions of products (experiment/precision.py)
MEMORY = ("fit", "keep", "segments", "recompute")
PRODUCTS = ("float32", "tf32", "bfloat16")

# Where the random numbers of batches and views are made (main.py, data_sets/counted_numbers.py)
RANDOM_NUMBERS = (HOST, DEVICE) = ("host", "device")

# linear_probe.py: ProbeLoss, SampledProbeLoss and RidgeLoss; how ProbeLoss is differentiated
PROBES = ("logistic", "sampled", "ridge")
PROBE_GRADIENTS = ("envelope", "implicit")

# meta_gradients.py and hypgraddesc.py
METHODS = ("reverse", "truncated", "lookback", "implicit", "forward", "es", "pes")
TOGETHER = ("auto", "always", "never")
META_OPTIMIZERS = ("adam", "rmsprop")
DECAYS = ("none", "cosine")
NONFINITE = ("skip", "stop")

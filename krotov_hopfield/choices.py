"""What there is to choose from, for parsers: no torch is loaded with it."""

ACTING = {  # gates, and what of a Competition each depends on
    "ranked": ("ranking_param", "delta"),
    "losers": ("delta",),
    "soft": ("inverse_temperature",),
    "winner": (),
}
GATES = tuple(ACTING)
NORMALIZATIONS = ("matrix", "filter", "clamp")
SCHEDULES = ("constant", "linear", "exponential")
FEATURE_NORMS = ("batch", "image")
AUGMENTATIONS = ("none", "crop", "flip")


def gate_needs(gate: str) -> list[tuple[str, bool, str]]:
    """For `refuse_idle_flags`: gates' options, whether `gate` depends on each, which gates do."""
    options = dict.fromkeys(name for acting in ACTING.values() for name in acting)
    return [
        (name, name in ACTING[gate], "--gate " + " or ".join(g for g in GATES if name in ACTING[g]))
        for name in options
    ]

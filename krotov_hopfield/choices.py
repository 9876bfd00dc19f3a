"""The choices that the settings offer; importing this module does not load torch."""

ACTING = {  # the gates, and the attributes of a Competition that each depends on
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
    """Which options act with a gate, as `refuse_idle_flags` in the command line takes it.

    Returns, for each option of any gate: its name, whether `gate` depends on it, and the flag with
    the gates that do.
    """
    options = dict.fromkeys(name for acting in ACTING.values() for name in acting)
    return [
        (name, name in ACTING[gate], "--gate " + " or ".join(g for g in GATES if name in ACTING[g]))
        for name in options
    ]

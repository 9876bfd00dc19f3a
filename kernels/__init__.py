"""The fast mathematics of the main job: sums of local terms, the probe, lateral dynamics."""

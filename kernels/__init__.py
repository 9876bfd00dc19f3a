"""The mathematics that makes the main job fast: sums of local terms, probes, lateral dynamics."""

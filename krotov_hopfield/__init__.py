"""Layers of competing hidden units, their compiled loops, networks and training."""

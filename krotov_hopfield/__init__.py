"""Layers of competing hidden units: their competition, its compiled loops, networks and their training."""

"""Learned optimisers: networks, meta-training, what they optimise, broken symmetries."""

"""Learned optimisers: their networks, gradients and meta-training, what they optimise, the symmetries they break."""

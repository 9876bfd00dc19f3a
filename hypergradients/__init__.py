"""Hypergradients of any update maps: HyperTorch's functions and beyond, their solvers, differentiable optimisers."""

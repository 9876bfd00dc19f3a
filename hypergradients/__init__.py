"""Hypergradients of any update maps: HyperTorch's functions, solvers, inner optimisers."""

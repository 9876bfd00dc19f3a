"""Comparisons: learned, classical and reference methods, trained and judged in the same way."""

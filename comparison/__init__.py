"""Learned, classical and reference methods, trained and judged alike."""

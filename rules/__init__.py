"""Families of learning rules beyond the polynomial one."""

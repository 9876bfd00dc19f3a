"""Searches over the flags of any command: space, study, trial, report."""

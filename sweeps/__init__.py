"""Searches over the flags of any command, and for a rule without gradients."""

"""Shared by every command: flags, run directories, step loop, processes, seeds, atomic files."""

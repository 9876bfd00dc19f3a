"""What every command leans on: flags, run directories, steps, processes, seeds, whole files."""

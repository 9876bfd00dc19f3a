"""What every command leans on: flags, run directories, the loop of steps, processes, seeds, whole files."""

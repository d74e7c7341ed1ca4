"""What stands around runs: a new project, the keys of run files, the runs there are, side by side; this machine."""

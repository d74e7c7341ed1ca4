"""`backend: {name: cuda}`: compiled blocks over a mesh of processes, with four kinds of parallelism."""

"""What a run will be and what it takes: on paper, on one machine, on a cluster."""

"""What `crystal bench` runs: ours beside the peers that are installed, in turns, on one machine."""

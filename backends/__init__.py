"""Where a training step runs. One protocol (`base`), one file or folder a backend."""

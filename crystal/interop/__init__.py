"""Other people's weights and run files, in and out: Hugging Face directories, Cerebras checkpoints and parameters."""

"""A checkpoint in use: loaded, continued as text, probed for its logits."""

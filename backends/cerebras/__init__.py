"""The real cerebras.pytorch behind our protocol: its own environment and process, spoken to over a pipe.

`worker` and `step` run inside that environment (torch 2.4), everything else in ours.
"""

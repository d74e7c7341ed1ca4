"""Shared settings: few threads (several tests run at once), and a hypothesis profile without deadlines."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the command sets it: threads that wait sleep

import torch
from hypothesis import settings

torch.set_num_threads(2)
settings.register_profile("crystal", deadline=None, max_examples=50)
settings.load_profile("crystal")

"""What tests of backends leave behind in their process."""

import pytest
import torch.distributed as dist


@pytest.fixture(scope="module", autouse=True)
def _no_process_group_is_left():
    """The cuda backend joins one, which would be the next file's too: a process group is one for all of a process."""
    yield
    if dist.is_initialized():
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # DTensor keeps meshes in it

"""One thread: the tensors here are small, and threads that wait for each other cost more than they bring."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)

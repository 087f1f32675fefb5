"""Every test draws the same numbers whenever it runs."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_numbers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield

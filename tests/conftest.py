"""What all tests share."""

import gc
import os

import pytest
import torch

# the models here are so small that sharing their work out costs more than it saves
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start
# no test loses power, and waiting for the disk takes as long as a step of these models, for each file of a checkpoint
os.fsync = lambda descriptor: None


def pytest_collection_finish():
    # what the imports made stays: each Trainer collects garbage, and looking through it all took half of a short run
    gc.collect()
    gc.freeze()


@pytest.fixture
def hub():
    """A local server that speaks the Hub's HTTP."""
    from hub_stub import HubStub  # not for every test: it imports all of hf_chts

    with HubStub() as hub:
        yield hub


@pytest.fixture
def waits(hub, monkeypatch):
    """This process pushes to `hub`; the seconds that it would have waited."""
    return hub.connect(monkeypatch)

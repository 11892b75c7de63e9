"""What all tests share."""

import os

import pytest
import torch
from quick import be_quick

# the models here are so small that sharing their work out costs more than it saves
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for processes that tests start


def pytest_collection_finish():
    be_quick()


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

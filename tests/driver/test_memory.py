"""A warning before an object store is full, once each time."""

import pytest

from raylhf.driver import memory


@pytest.fixture
def watch(monkeypatch):
    """watch(share of the second node) -> what `StoreWatch.fullest` says, for one and the same watch."""
    one = memory.StoreWatch()

    def look(share):
        monkeypatch.setattr(memory, "object_store_use", lambda: {"10.0.0.1": 0.1, "10.0.0.2": share})
        return one.fullest()

    return look


def test_the_fullest_node_is_named_once_each_time_that_it_fills_up(watch, caplog):
    assert [watch(share) for share in (0.5, 0.75, 0.9, 0.3, 0.8)] == [0.5, 0.75, 0.9, 0.3, 0.8]
    first, second = caplog.messages
    assert "10.0.0.2 is 75 % full" in first and "object_store_gib" in first
    assert "10.0.0.2 is 80 % full" in second


def test_without_a_node_there_is_nothing_to_tell(monkeypatch, caplog):
    monkeypatch.setattr(memory, "object_store_use", dict)
    assert memory.StoreWatch().fullest() == 0 and not caplog.messages

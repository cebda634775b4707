"""The states of a worker that may be replaced."""

import itertools

import pytest

from raylhf.cluster.health import UP, Event, Health, Pulse, next_health

LIFE = (
    (Event.STARTED, Health.STALE),
    (Event.REFRESHED, Health.HEALTHY),
    (Event.LATE, Health.SUSPECT),
    (Event.ANSWERED, Health.HEALTHY),
    (Event.LATE, Health.SUSPECT),
    (Event.LOST, Health.DEAD),
    (Event.RELAUNCHED, Health.RESTARTING),
    (Event.STARTED, Health.STALE),
    (Event.REFRESHED, Health.HEALTHY),
    (Event.OUTDATED, Health.STALE),
)


def reachable(start, events):
    """States that can follow `start` by any number of `events`."""
    found, open_states = {start}, [start]
    while open_states:
        state = open_states.pop()
        for event in events:
            try:
                following = next_health(state, event)
            except ValueError:
                continue
            if following not in found:
                found.add(following)
                open_states.append(following)
    return found


def test_a_life():
    health = Health.RESTARTING
    for event, expected in LIFE:
        health = next_health(health, event)
        assert health is expected


def test_whoever_starts_serves_only_after_it_was_refreshed():
    without = [event for event in Event if event is not Event.REFRESHED]
    for start in (Health.DEAD, Health.RESTARTING, Health.STALE):
        assert Health.HEALTHY not in reachable(start, without)
        assert Health.SUSPECT not in reachable(start, without)


def test_the_dead_come_back_only_by_being_relaunched_and_started():
    assert reachable(Health.DEAD, [event for event in Event if event is not Event.RELAUNCHED]) == {Health.DEAD}
    assert not reachable(Health.DEAD, [event for event in Event if event is not Event.STARTED]) & UP


def test_every_worker_that_is_up_can_be_lost_and_every_state_is_left_by_some_event():
    for health in Health:
        assert any(is_left(health, event) for event in Event)
    assert all(next_health(health, Event.LOST) is Health.DEAD for health in Health)


def is_left(health, event):
    try:
        return next_health(health, event) is not health
    except ValueError:
        return False


def test_an_event_that_cannot_happen_is_an_error():
    impossible = [(Health.DEAD, Event.ANSWERED), (Health.HEALTHY, Event.STARTED), (Health.RESTARTING, Event.REFRESHED)]
    for health, event in impossible:
        with pytest.raises(ValueError, match="cannot be"):
            next_health(health, event)
    allowed = sum(1 for pair in itertools.product(Health, Event) if can(*pair))
    assert allowed == 20


def can(health, event):
    try:
        next_health(health, event)
    except ValueError:
        return False
    return True


@pytest.fixture
def pulse():
    pulse = Pulse(suspect_after_s=30, dead_after_s=60)
    pulse.apply(Event.STARTED)
    pulse.apply(Event.REFRESHED)
    return pulse


def test_silence_makes_a_worker_suspect_and_then_lost(pulse):
    assert not pulse.is_lost(1000.0)  # nobody asked
    pulse.asked(1000.0)
    pulse.asked(1020.0)  # the first question counts
    assert not pulse.is_lost(1029.0)
    assert pulse.health is Health.HEALTHY
    assert not pulse.is_lost(1030.0)
    assert pulse.health is Health.SUSPECT
    assert pulse.is_lost(1060.0)


def test_silence_while_nobody_looked_does_not_count(pulse):
    pulse.overlooked(900.0)  # nothing was asked
    assert pulse.asked_at is None
    pulse.asked(1000.0)
    pulse.overlooked(5000.0)
    assert not pulse.is_lost(5020.0)
    assert pulse.is_lost(5060.0)


def test_an_answer_ends_the_silence(pulse):
    pulse.asked(1000.0)
    assert not pulse.is_lost(1040.0)
    pulse.apply(Event.ANSWERED)
    assert pulse.health is Health.HEALTHY
    assert not pulse.is_lost(2000.0)


def test_a_stale_worker_that_is_silent_is_lost_too_but_never_suspect(pulse):
    pulse.apply(Event.OUTDATED)
    pulse.asked(1000.0)
    assert not pulse.is_lost(1040.0)
    assert pulse.health is Health.STALE
    assert pulse.is_lost(1060.0)

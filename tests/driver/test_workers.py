"""How a run's workers join and leave: the reservations are stand-ins."""

from types import SimpleNamespace
from typing import Any, cast

from raylhf.driver.workers import Workers


class Place:
    def __init__(self):
        self.taken, self.kept = [], []

    def take(self, number):
        self.taken.append(number)
        return number < 3

    def keep(self, numbers):
        self.kept.append(sorted(numbers))


def made():
    workers: Any = object.__new__(Workers)
    workers._places = {"rollout": Place()}
    workers.rollout = SimpleNamespace(members={0: None, 2: None}, free_number=lambda: 1)
    workers.scaling = SimpleNamespace(follow=lambda pool: pool.members.pop(2))
    return cast(Workers, workers), workers._places["rollout"]


def test_who_left_gives_its_reservation_back():
    workers, place = made()
    workers.follow_scaling()
    assert place.kept == [[0]]


def test_room_for_one_more_is_reserved_for_the_next_number():
    workers, place = made()
    assert workers.has_room() and place.taken == [1]

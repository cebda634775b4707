"""What the driver makes of calls that ended badly."""

import pytest

from raylhf.cluster.actors import Outcome, Trouble, WorkerError, WorkersLostError, raise_trouble

LOST = Outcome(trouble=Trouble.LOST_DATA, reason="its node is gone")
FAILED = Outcome(trouble=Trouble.FAILED, reason="RuntimeError: connection closed by peer")


def test_an_answer_that_is_lost_with_its_node_is_a_lost_worker_which_others_only_lost_contact_with():
    with pytest.raises(WorkersLostError, match="the answer of learner 0 in learning is lost") as caught:
        raise_trouble({"learner 1": FAILED, "learner 0": LOST}, "learning")
    assert caught.value.names == ("learner 0",)


def test_a_worker_that_raises_is_not_lost():
    with pytest.raises(WorkerError, match="learner 1 failed in learning") as caught:
        raise_trouble({"learner 1": FAILED, "learner 0": Outcome({})}, "learning")
    assert not isinstance(caught.value, WorkersLostError)

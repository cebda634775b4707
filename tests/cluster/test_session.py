"""Starting Ray, with a stand-in for `ray.init`: the tests in tests/e2e start the real one."""

import socket

import pytest

from raylhf.cluster import session
from raylhf.cluster.actors import WorkerError
from raylhf.cluster.session import preflight, ray_session
from raylhf.config.cluster import ClusterConfig
from raylhf.config.placement import Role


@pytest.fixture
def ray_that(monkeypatch):
    """ray_that(errors) -> how often it was started: each start raises the next error, or succeeds at None."""

    def install(*errors):
        starts = []

        def init(**settings):
            starts.append(settings)
            if (error := errors[len(starts) - 1]) is not None:
                raise error

        monkeypatch.setattr(session.ray, "init", init)
        monkeypatch.setattr(session.ray, "shutdown", lambda: None)
        return starts

    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "")  # restored afterwards
    return install


SLOW = Exception("The current node timed out during startup.")


def test_a_ray_that_starts_too_slowly_is_started_again(ray_that):
    starts = ray_that(SLOW, None)
    with ray_session(ClusterConfig(), env={}):
        pass
    assert len(starts) == 2


def test_after_three_slow_starts_the_run_gives_up_with_a_sentence(ray_that):
    ray_that(SLOW, SLOW, SLOW)
    with pytest.raises(WorkerError, match="Ray did not start in 3 attempts"), ray_session(ClusterConfig(), env={}):
        pass


def test_an_address_where_no_ray_is_is_told_in_a_sentence(ray_that):
    ray_that(ConnectionError("refused"))
    config = ClusterConfig(address="10.0.0.1:6379")
    with pytest.raises(WorkerError, match="no Ray answers there"), ray_session(config, env={}):
        pass


def test_a_port_for_metrics_that_is_taken_is_told_of_before_ray_fails_at_it(ray_that):
    starts = ray_that(None)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(ValueError, match=f"tracking.prometheus_port: {port} cannot be listened at"),
            ray_session(ClusterConfig(), env={}, prometheus_port=port),
        ):
            pass
    with ray_session(ClusterConfig(), env={}, prometheus_port=port):
        pass
    assert [start["_metrics_export_port"] for start in starts] == [port]


def test_other_errors_are_not_retried(ray_that):
    starts = ray_that(ValueError("num_cpus must be positive"))
    with pytest.raises(ValueError, match="num_cpus"), ray_session(ClusterConfig(), env={}):
        pass
    assert len(starts) == 1


@pytest.mark.parametrize(
    ("role", "sentence"),
    [
        (Role("learner", 1, 1.0, 2.0), "no node can hold one learner"),
        (Role("rollout", 3, 2.0, 0.0), r"the run needs 6 CPU \(rollout 3 x 2\) but the cluster has 4"),
        (
            Role("rollout", 3, 1.0, 0.0, placement="STRICT_SPREAD"),
            "STRICT_SPREAD of rollout asks for 3 nodes.*1 CPU.*only 2 can hold one.*2 CPU / 1 GPU.*Use SPREAD",
        ),
        (
            Role("learner", 3, 1.0, 0.0, placement="STRICT_PACK"),
            "STRICT_PACK of learner asks for one node that holds 3 x .*1 CPU.*more than 2.*2 CPU / 1 GPU.*Use PACK",
        ),
        (Role("rollout", 2, 0.5, 0.6, placement="STRICT_PACK"), "none holds more than 1"),
    ],
)
def test_a_request_that_the_nodes_cannot_serve_names_role_and_nodes(monkeypatch, role, sentence):
    node = {"Alive": True, "Resources": {"CPU": 2.0, "GPU": 1.0}}
    monkeypatch.setattr(session.ray, "nodes", lambda: [node, node, {"Alive": False, "Resources": {"CPU": 64.0}}])
    preflight([Role("reward", 1, 0.5, 0.0)])
    preflight([Role("reward", 2, 0.5, 0.5, placement="STRICT_PACK"), Role("b", 2, 1, 0, placement="STRICT_SPREAD")])
    preflight([Role("rollout", 9, 0.5, 0.0, num_apart=8)])  # those that may come later
    with pytest.raises(ValueError, match=sentence):
        preflight([role])

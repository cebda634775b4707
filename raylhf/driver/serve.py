"""`raylhf serve-reward`: a reward graph over HTTP until the user ends it."""

import sys

from raylhf.cluster.actors import StopRequestedError, WorkerError
from raylhf.cluster.serving import served_reward, watch
from raylhf.config.service import ServiceConfig
from raylhf.driver.job import ENVIRONMENT
from raylhf.driver.train import EXIT_FAILED, EXIT_OK, StopRequest, stop_on_signal
from raylhf.rewards.endpoint import token_digest
from raylhf.tracking.redaction import without_secrets


def serve_reward(config: ServiceConfig, token: str) -> int:
    """Serve to whoever has the token, until Ctrl-C or SIGTERM, which is the orderly end; returns the exit code."""
    should_stop = StopRequest()
    try:
        with stop_on_signal(should_stop):
            print("starting Ray Serve and the reward", file=sys.stderr, flush=True)
            with served_reward(config, token_digest(token), env=ENVIRONMENT, should_stop=should_stop):
                print(welcome(config), flush=True)
                watch(should_stop=should_stop)
                print("shutting down", file=sys.stderr, flush=True)
    except StopRequestedError:
        pass
    except WorkerError as error:
        print(without_secrets(f"raylhf: {error}"), file=sys.stderr)
        return EXIT_FAILED
    return EXIT_OK


def welcome(config: ServiceConfig) -> str:
    """Where the reward is, and how it is used."""
    settings = config.serve
    url = f"http://{f'[{settings.host}]' if ':' in settings.host else settings.host}:{settings.port}"
    return (
        f"serving the {config.reward.graph.kind} reward at {url}: POST /score and GET /metrics with the bearer token, "
        "GET /health without (docs/reward_protocol.md)\n"
        f"in a config: {{kind: remote, url: '{url}', token_env: {settings.token_env}}}"
    )

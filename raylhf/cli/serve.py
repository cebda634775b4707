"""`raylhf serve-reward`: a reward graph over HTTP."""

import sys
from collections.abc import Sequence

from raylhf.config.service import ServiceConfig, load_service_config


def run_serve_reward(path: str, overrides: Sequence[str]) -> int:
    """Check the settings, then serve. A ValueError is the user's mistake: its sentence is the whole message."""
    config = load_service(path, overrides)
    from raylhf.rewards.endpoint import read_token, require_free_port

    try:
        token = read_token(config.serve)
        if config.cluster.address is None:
            require_free_port(config.serve.host, config.serve.port)
        from raylhf.driver.serve import serve_reward  # Ray takes seconds to import, and is not needed for a mistake

        return serve_reward(config, token)
    except ValueError as error:
        print(f"raylhf: {error}", file=sys.stderr)
        return 2


def load_service(path: str, overrides: Sequence[str]) -> ServiceConfig:
    """The checked settings; what is other than in a run is said on standard error."""
    config = load_service_config(path, overrides)
    for note in config.notes:
        print(f"note: {note}", file=sys.stderr)
    return config

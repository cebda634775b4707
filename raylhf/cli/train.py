"""`raylhf train`: run a config."""

import sys
from collections.abc import Sequence

from raylhf.config.load import load_any_config


def run_train(path: str, overrides: Sequence[str]) -> int:
    """Check the settings, then train; the engines are imported only after the check.

    A ValueError is the user's mistake (a missing file, a malformed row): its sentence is the whole message.
    """
    config = load_any_config(path, overrides)
    from raylhf.driver.train import train

    try:
        return train(config)
    except ValueError as error:
        print(f"raylhf: {error}", file=sys.stderr)
        return 2

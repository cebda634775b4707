"""`raylhf train`: run a config."""

from collections.abc import Sequence

from raylhf.config.load import load_config


def run_train(path: str, overrides: Sequence[str]) -> int:
    """Check the settings, then train; the engines are imported only after the check."""
    config = load_config(path, overrides)
    from raylhf.driver.train import train

    return train(config)

"""The table of methods: complete, and the one in the docs."""

from importlib import import_module
from pathlib import Path
from typing import get_args

from raylhf.cli import main
from raylhf.config.algorithms import LOSSES, METHODS, render_algorithms
from raylhf.config.objective import PPOConfig
from raylhf.config.preference_losses import PreferenceLoss
from raylhf.config.schema import kind_of, models_of

DOCS = Path(__file__).parents[2] / "docs" / "algorithms.md"


def test_every_loss_and_every_advantage_is_in_the_table():
    assert list(LOSSES) == [kind_of(model) for model in models_of(PreferenceLoss)]
    advantages = get_args(PPOConfig.model_fields["advantage"].annotation)
    assert {name.rpartition(" ")[2] for name in METHODS if name.startswith("ppo")} == set(advantages)


def test_the_docs_hold_the_table():
    assert DOCS.read_text().endswith(render_algorithms()), "paste what render_algorithms() returns"


def test_every_function_of_the_table_exists():
    for entry in (*METHODS.values(), *LOSSES.values()):
        for name in entry.function.split(", "):
            module, _, function = name.rpartition(".")
            assert hasattr(import_module(f"raylhf.algos.{module}"), function), name


def test_the_command_lists_what_each_needs(capsys):
    assert main(["algorithms"]) == 0
    shown = capsys.readouterr().out
    for name in (*METHODS, *LOSSES):
        assert name in shown
    assert "a gradient of a gradient" in " ".join(shown.split())

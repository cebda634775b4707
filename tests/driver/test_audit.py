"""The audit: hand-written histories, sound and unsound; and random runs, whole and corrupted."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from raylhf.batch import Prompt
from raylhf.cli import main
from raylhf.driver.audit import audit
from raylhf.driver.ledger import Ledger, read_ledger
from raylhf.text.prompts import PromptOrder

Event = dict[str, Any]


def begun(step: int, next_draw: int) -> Event:
    return {"event": "begun", "step": step, "next_draw": next_draw}


def issued(step: int, *draws: int, **others: int) -> Event:
    """Draw d is prompt 10 + d, but for `others` (d7=3: draw 7 is prompt 3)."""
    prompts = {d: 10 + d for d in draws} | {int(name[1:]): prompt for name, prompt in others.items()}
    return {"event": "issued", "step": step, "draws": {str(d): prompt for d, prompt in prompts.items()}}


def consumed(step: int, *draws: int) -> Event:
    return {"event": "consumed", "step": step, "draws": {str(d): 4 for d in draws}}


def dropped(step: int, *draws: int) -> Event:
    return {"event": "dropped", "step": step, "draws": list(draws), "reason": "no valid score"}


def reissued(*draws: int) -> Event:
    return {"event": "reissued", "draws": list(draws), "worker": "rollout 1", "reason": "died"}


def saved(step: int) -> Event:
    return {"event": "saved", "step": step}


START = begun(0, 0)
TWO_STEPS = [START, issued(1, 0, 1), consumed(1, 0, 1), saved(1), issued(2, 2, 3), consumed(2, 2, 3), saved(2)]

SOUND: dict[str, tuple[list[Event], dict[str, Any]]] = {
    "death before the start": ([], {"steps": 0, "drawn": 0}),
    "no interruption": (TWO_STEPS, {"steps": 2, "drawn": 4, "consumed": 4, "responses": 16, "returns": 0}),
    "the present": ([*TWO_STEPS, issued(3, 4, 5)], {"drawn": 6, "consumed": 4, "pending": 2}),
    "death between issue and consume": (
        [*TWO_STEPS, issued(3, 4, 5), begun(2, 4), issued(3, 4, 5), consumed(3, 4, 5)],
        {"steps": 3, "drawn": 6, "consumed": 6, "pending": 0, "rolled_back": 0, "returns": 1},
    ),
    "death after consume, before save": (
        [*TWO_STEPS, issued(3, 4), consumed(3, 4), begun(2, 4), issued(3, 4)],
        {"steps": 2, "drawn": 5, "consumed": 4, "pending": 1, "rolled_back": 1},
    ),
    "death after the checkpoint, before its line": (
        [*TWO_STEPS, issued(3, 4), consumed(3, 4), begun(3, 5), issued(4, 5), consumed(4, 5), begun(3, 5)],
        {"steps": 3, "consumed": 5, "rolled_back": 1},
    ),
    "return by two steps, as the newest checkpoint was damaged": (
        [*TWO_STEPS, issued(3, 4), consumed(3, 4), begun(1, 2), issued(2, 2, 3), consumed(2, 2, 3)],
        {"steps": 2, "drawn": 4, "consumed": 4, "rolled_back": 3},
    ),
    "return to the start": ([*TWO_STEPS, begun(0, 0)], {"steps": 0, "drawn": 0, "rolled_back": 4}),
    "batches ahead of their step, drawn again after a death": (
        [*TWO_STEPS, issued(3, 4), issued(4, 5, 6), consumed(3, 4), saved(3), begun(3, 5), issued(4, 5, 6)],
        {"drawn": 7, "consumed": 5, "pending": 2, "rolled_back": 0},
    ),
    "drops": (
        [START, issued(1, 0, 1, 2), dropped(1, 1), dropped(1, 2), consumed(1, 0), issued(2, 3), dropped(2, 3)],
        {"consumed": 1, "dropped": {"no valid score": 3}, "pending": 0},
    ),
    "drops made void": (
        [*TWO_STEPS, issued(3, 4), dropped(3, 4), consumed(3), begun(2, 4), issued(3, 4), consumed(3, 4)],
        {"consumed": 5, "dropped": {}, "rolled_back": 0},
    ),
    "a worker's death": (
        [START, issued(1, 0, 1), reissued(1), reissued(1), consumed(1, 0, 1)],
        {"consumed": 2, "reissued": 2},
    ),
    "exclusions, told at every start": (
        [START, {"event": "excluded", "prompts": [3, 4], "reason": "too long"}] * 2,
        {"excluded": 2},
    ),
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_history_has_no_problem_and_these_counts(name):
    events, counts = SOUND[name]
    found = audit(events)
    assert found.problems == ()
    assert {key: getattr(found, key) for key in counts} == counts


UNSOUND: dict[str, list[Event]] = {
    "draw 1 was consumed in step 2 after it had been consumed in step 1": [
        START, issued(1, 0, 1), consumed(1, 0, 1), issued(2, 2), consumed(2, 1, 2),
    ],
    "draw 1 was consumed in step 2 after it had been dropped in step 1": [
        START, issued(1, 0, 1), dropped(1, 1), consumed(1, 0), consumed(2, 1),
    ],
    "draw 1 was left out of step 1: issued for it, and neither consumed nor dropped": [
        START, issued(1, 0, 1), consumed(1, 0),
    ],
    "draws 2 and 3 were left out of step 2: issued for it, and neither consumed nor dropped": [
        START, issued(1, 0, 1), issued(2, 2, 3), consumed(1, 0, 1), consumed(2),
    ],
    "draw 1 was consumed in step 1, and issued for step 2": [START, issued(1, 0), issued(2, 1), consumed(1, 0, 1)],
    "draw 2 was consumed in step 1 without being issued": [START, issued(1, 0, 1), consumed(1, 0, 2)],
    "draw 2 was dropped in step 1 without being issued": [START, issued(1, 0, 1), dropped(1, 2)],
    "draw 4 was consumed in step 3 without being issued": [
        *TWO_STEPS, issued(3, 4), begun(2, 4), consumed(3, 4),
    ],
    "draw 1 was issued a second time (for step 2)": [START, issued(1, 0, 1), consumed(1, 0), issued(2, 1, 2)],
    "draw 0 was issued a second time (for step 2)": [START, issued(1, 0), consumed(1, 0), issued(2, 0)],
    "a gap in the draws: draw 2 was issued where draw 1 was the next": [START, issued(1, 0), issued(1, 2)],
    "a gap in the draws: draws 1 and 3 were issued where draw 1 was the next": [START, issued(1, 0), issued(1, 1, 3)],
    "draw 4 was issued again after a return, as another prompt": [
        *TWO_STEPS, issued(3, 4), begun(2, 4), issued(3, d4=9),
    ],
    "step 3 was consumed after step 1: step 2 is missing": [
        START, issued(1, 0), consumed(1, 0), issued(3, 1), consumed(3, 1),
    ],
    "step 4 was consumed after step 1: 2 steps are missing": [START, issued(1, 0), consumed(1, 0), consumed(4)],
    "step 1 was consumed when 2 steps were done already": [*TWO_STEPS, consumed(1)],
    "draw 4 was dropped in step 4, when 2 steps were done": [*TWO_STEPS, issued(3, 4), dropped(4, 4)],
    "draw 3 was dropped in step 2, when 2 steps were done": [*TWO_STEPS, dropped(2, 3)],
    "draw 4 was issued for step 2, when 2 steps were done already": [*TWO_STEPS, issued(2, 4)],
    "a checkpoint of step 3 was saved when 2 steps were done": [*TWO_STEPS, saved(3)],
    "draws 2 and 3 were lost at the start from step 1, draw 4: neither consumed nor dropped by then": [
        *TWO_STEPS, begun(1, 4),
    ],
    "draws 2 and 3 were doubled at the start from step 2, draw 2: settled by then, and drawn again": [
        *TWO_STEPS, begun(2, 2),
    ],
    "the run went back to step 1, of which no checkpoint is told": [
        START, issued(1, 0), consumed(1, 0), issued(2, 1), consumed(2, 1), begun(1, 1),
    ],
    "the run went on from step 3, but only 2 steps had been done": [*TWO_STEPS, begun(3, 4)],
    "draw 3 was sampled again after the loss of rollout 1, but not in flight": [*TWO_STEPS, reissued(3)],
    "draw 9 was sampled again after the loss of rollout 1, but not in flight": [*TWO_STEPS, reissued(9)],
    "draw 0 was issued with a prompt that is excluded": [
        START, {"event": "excluded", "prompts": [10], "reason": "too long"}, issued(1, 0),
    ],
    "the ledger does not begin with a start: its first event is 'issued'": TWO_STEPS[1:],
    "line 2 of the ledger is not JSON, and no new start follows it": [
        START, {"event": "unreadable", "line": 2}, *TWO_STEPS[1:],
    ],
    "event 2 ('eaten') is malformed: KeyError('eaten')": [START, {"event": "eaten"}],
    "event 2 ('saved') is malformed: TypeError(\"_Replay._save() missing 1 required positional argument: 'step'\")": [
        START, {"event": "saved"},
    ],
}  # fmt: skip


@pytest.mark.parametrize("problem", UNSOUND)
def test_an_unsound_history_is_told_of_in_a_sentence(problem):
    assert problem in audit(UNSOUND[problem]).problems


def test_many_draws_are_named_by_the_first_few():
    (problem,) = audit([START, issued(1, *range(9)), issued(1, *range(9))]).problems
    assert problem == "draws 0, 1, 2, 3, 4 and 4 more were issued a second time (for step 1)"


@pytest.mark.parametrize(
    ("logged", "problem"),
    [
        ([0, 1, 2], None),
        ([0, 1], None),  # the driver died before it logged the newest step
        ([0, 2], "step 1 was consumed, and missing in metrics.jsonl"),
        ([0, 1, 2, 3], "metrics.jsonl ends with step 3, the ledger with step 2"),
        ([0], "metrics.jsonl ends with step 0, the ledger with step 2"),
    ],
)
def test_steps_of_the_ledger_and_of_the_metrics_are_the_same(logged, problem):
    assert audit(TWO_STEPS, logged_steps=logged).problems == ((problem,) if problem else ())


def test_a_resume_that_cut_the_metrics_back_and_died_before_it_began_is_sound():
    further = [issued(3, 4), consumed(3, 4), issued(4, 5), consumed(4, 5)]
    assert audit([*TWO_STEPS, *further], logged_steps=[0, 1, 2]).problems == ()


def state(step: int, epoch: int, position: int, num_prompts: int = 3) -> dict[str, Any]:
    return {"step": step, "order": {"epoch": epoch, "position": position, "num_prompts": num_prompts}}


FIRST_STEP = [START, issued(1, d0=5, d1=7), consumed(1, 0, 1), saved(1)]
TWO_EPOCHS = [*FIRST_STEP, issued(2, d2=6, d3=7), consumed(2, 2, 3), saved(2)]


@pytest.mark.parametrize(
    ("events", "state", "problem"),
    [
        (TWO_EPOCHS, state(2, 1, 1), None),
        (TWO_EPOCHS, state(1, 0, 2), None),
        ([*FIRST_STEP, issued(2, d2=6), consumed(2, 2)], state(2, 0, 3), None),  # its line is yet to come
        ([*TWO_EPOCHS, issued(3, d4=5, d5=6)], state(2, 1, 1), None),
        (
            TWO_EPOCHS,
            state(2, 1, 2),
            "draw 4 was lost by the checkpoint of step 2, which draws on at 5: before that, and not settled",
        ),
        (
            TWO_EPOCHS,
            state(2, 1, 0),
            "draw 3 was doubled by the checkpoint of step 2, which draws on at 3: settled, and to come again",
        ),
        (TWO_EPOCHS[:-2], state(2, 0, 2), "the newest checkpoint is of step 2, the ledger ends with step 1"),
        (
            [*FIRST_STEP[:3], *TWO_EPOCHS[4:]],
            state(1, 0, 2),
            "the newest checkpoint is of step 1, and the ledger tells of none",
        ),
        (
            [*TWO_EPOCHS, issued(3, d4=7)],
            state(2, 1, 1),
            "draws 3 and 4 were drawn with a prompt that the same epoch holds twice",
        ),
        ([*TWO_EPOCHS, issued(3, d4=8)], state(2, 1, 1), "4 different prompts were drawn, and there are 3 to train on"),
    ],
)
def test_the_newest_checkpoint_draws_on_where_the_ledger_says(events, state, problem):
    assert audit(events, state=state).problems == ((problem,) if problem else ())


class Training:
    """A run as the driver leads it: draws batches ahead, consumes them in order, drops, saves; and dies, and is
    resumed."""

    def __init__(self, folder: Path, rng: random.Random, *, num_prompts: int) -> None:
        self.folder, self.rng = folder, rng
        rows = rng.sample(range(num_prompts + 3), num_prompts)
        self.prompts = [Prompt(index=row, messages=({"role": "user", "content": "x"},)) for row in rows]
        self.excluded = sorted(set(range(num_prompts + 3)) - set(rows))
        self.checkpoints: list[dict[str, Any]] = []
        self.logged: list[int] = []
        self.drawn: dict[int, int] = {}
        self.start()

    def start(self) -> None:
        """Start, or resume from one of the newest checkpoints."""
        del self.checkpoints[len(self.checkpoints) - self.rng.choice([0, 0, 0, 1, 2]) :]  # damaged ones
        self.order = PromptOrder(self.prompts, seed=3)
        self.step = 0
        self.batches: list[dict[int, int]] = []
        """Draws of the steps to come, with the place of the order before each."""
        self.places: list[dict[str, int]] = []
        if self.checkpoints:
            newest = self.checkpoints[-1]
            self.order.restore(newest["order"])
            self.step = newest["step"]
        self.logged = [step for step in self.logged if step <= self.step]
        self.ledger = Ledger(self.folder)
        if self.rng.random() < 0.1:
            return self.die()
        self.ledger.begin(self.step, next_draw=self.order.num_drawn)
        self.ledger.exclude(self.excluded, "too long")
        return None

    @property
    def position(self) -> dict[str, int]:
        """Where the order stood before the first prompt that is not settled."""
        return self.places[0] if self.places else self.order.state()

    def die(self) -> None:
        """The process is killed, perhaps in the middle of a line; the same command is given again."""
        self.ledger.close()
        if self.rng.random() < 0.3:
            with (self.folder / "ledger.jsonl").open("a") as file:
                file.write('{"event": "consumed", "step"')
        self.start()

    def draw(self) -> None:
        """Issue a batch for the first step that has none."""
        self.places.append(self.order.state())
        first = self.order.num_drawn
        rows = [prompt.index for prompt in self.order.draw(self.rng.randint(1, 5))]
        self.batches.append(dict(enumerate(rows, start=first)))
        self.drawn |= self.batches[-1]
        self.ledger.issue(self.step + len(self.batches), self.batches[-1])

    def train_step(self) -> None:
        rng, ledger, step = self.rng, self.ledger, self.step + 1
        while len(self.batches) < rng.choice([1, 1, 2, 3]):
            self.draw()
        if rng.random() < 0.2:
            waiting = [d for batch in self.batches for d in batch]
            ledger.reissue(rng.sample(waiting, rng.randint(1, len(waiting))), "rollout 0", "died")
        if rng.random() < 0.1:
            return self.die()
        taken = list(self.batches.pop(0))
        self.places.pop(0)
        rng.shuffle(taken)
        num_dropped = rng.choice([0, 0, 1])
        if num_dropped:
            ledger.drop(step, taken[:num_dropped], "no valid score")
        ledger.consume(step, dict.fromkeys(taken[num_dropped:], 4))
        self.step = step
        if rng.random() < 0.1:
            return self.die()
        self.logged.append(step)
        if rng.random() < 0.4:
            self.checkpoints.append({"step": step, "order": self.position})
            if rng.random() < 0.1:
                return self.die()
            ledger.save(step)
        return None if rng.random() < 0.9 else self.die()

    def audit(self, events: Sequence[Event]) -> tuple[str, ...]:
        newest = self.checkpoints[-1] if self.checkpoints else None
        return audit(events, logged_steps=[0, *self.logged], state=newest).problems


def random_training(folder: Path, seed: int) -> tuple[Training, list[Event]]:
    training = Training(folder, random.Random(seed), num_prompts=7)
    for _ in range(30):
        training.train_step()
    training.ledger.close()
    return training, read_ledger(folder)


def corruptions(training: Training, events: list[Event], rng: random.Random) -> list[list[Event]]:
    """Every kind of corruption of the history that survives, at a random event each."""
    # What was consumed and then made void may be missing: it could be that it never happened.
    history = [i for i, event in enumerate(events) if event["event"] == "begun"][-1]
    tail = range(history + 1, len(events))
    uses = [i for i in tail if events[i]["event"] == "consumed" and events[i]["step"] in training.logged]
    issues = [i for i in tail if events[i]["event"] == "issued"]
    is_used = {d for i in uses for d in events[i]["draws"]}
    used_issues = [i for i in issues if is_used & events[i]["draws"].keys()]
    corrupted = []
    for chosen in (uses, issues):
        if chosen:
            i = rng.choice(chosen)
            corrupted.append([*events[: i + 1], *events[i:]])
    for chosen in (uses, used_issues):
        if chosen:
            i = rng.choice(chosen)
            corrupted.append([*events[:i], *events[i + 1 :]])
    if issues and training.checkpoints:  # tells how many prompts there are
        i = rng.choice(issues)
        foreign = {**events[i]["draws"], rng.choice(list(events[i]["draws"])): rng.choice(training.excluded)}
        corrupted.append([*events[:i], {**events[i], "draws": foreign}, *events[i + 1 :]])
        corrupted += exchanged(training, events, i, rng)
    return corrupted


def exchanged(training: Training, events: list[Event], i: int, rng: random.Random) -> list[list[Event]]:
    """One draw of event i gets the prompt of another draw of its epoch."""
    d, row = rng.choice(list(events[i]["draws"].items()))
    num_prompts = len(training.prompts)
    surviving = range(training.order.num_drawn)
    others = [
        training.drawn[e]
        for e in surviving
        if e // num_prompts == int(d) // num_prompts and training.drawn[e] != row
    ]  # fmt: skip
    if not others:
        return []
    changed = {**events[i], "draws": {**events[i]["draws"], d: rng.choice(others)}}
    return [[*events[:i], changed, *events[i + 1 :]]]


@pytest.mark.parametrize("seed", range(60))
def test_a_random_run_is_sound_whatever_befell_it_and_any_corruption_is_found(seed, tmp_path):
    training, events = random_training(tmp_path, seed)
    assert training.audit(events) == ()
    assert not any(audit(events[:n]).problems for n in range(len(events)))  # while it went on
    rng = random.Random(f"corruption/{seed}")
    for number, corrupted in enumerate(corruptions(training, events, rng)):
        assert training.audit(corrupted), f"corruption {number} of seed {seed} was not found"


def test_random_runs_do_die_return_and_drop(tmp_path):
    found = []
    for seed in range(20):
        (tmp_path / str(seed)).mkdir()
        found.append(audit(random_training(tmp_path / str(seed), seed)[1]))
    for count in ("returns", "rolled_back", "reissued", "pending", "dropped"):
        assert sum(bool(getattr(one, count)) for one in found) > 5, count


def run_folder(folder: Path, events: Sequence[Event], steps: Sequence[int]) -> str:
    (folder / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in steps) + '{"st')
    checkpoint = folder / "checkpoints" / "step_2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "driver.json").write_text(json.dumps(state(2, 0, 4, num_prompts=9)))
    return str(folder)


def test_the_command_prints_counts_and_that_nothing_is_lost(tmp_path, capsys):
    folder = run_folder(tmp_path, [*TWO_STEPS, issued(3, 4), dropped(3, 4)], [0, 1, 2])
    assert main(["audit", folder]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in ("prompts drawn 5", "consumed 4", "dropped: no valid score 1", "pending 0", "responses learnt from 16"):
        assert line in lines
    assert lines[-1] == "nothing lost, nothing doubled"


def test_the_command_prints_the_problems_of_ledger_metrics_and_checkpoint(tmp_path, capsys):
    assert main(["audit", run_folder(tmp_path, TWO_STEPS[:-2], [0, 1, 2])]) == 1
    out = capsys.readouterr().out
    assert "problem: metrics.jsonl ends with step 2, the ledger with step 1" in out
    assert "problem: the newest checkpoint is of step 2, the ledger ends with step 1" in out
    assert "nothing lost" not in out


def test_the_command_refuses_a_folder_without_a_ledger_and_broken_metrics(tmp_path, capsys):
    assert main(["audit", str(tmp_path)]) == 2
    assert "has no ledger.jsonl" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("[]\n")
    assert main(["audit", str(tmp_path)]) == 2
    assert "metrics.jsonl, line 1: no row of metrics" in capsys.readouterr().err

"""The proof that a run lost and doubled no prompt: its ledger replayed, and held against metrics and checkpoint."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raylhf.driver.ledger import UNREADABLE

_NUM_SHOWN = 5
_IN_FLIGHT, _CONSUMED, _DROPPED = "in flight", "consumed", "dropped"
_SETTLED = (_CONSUMED, _DROPPED)
_AFTER_TORN = ("begun", "excluded")
"""A process that finds a torn line begins anew, with one of these."""


@dataclass(frozen=True)
class Audit:
    """What a ledger comes to. Counts are of draws in the history that survives, unless they say otherwise."""

    steps: int
    """Steps done."""
    drawn: int
    consumed: int
    responses: int
    """Responses that were learnt from."""
    dropped: dict[str, int]
    """By reason."""
    pending: int
    """On their way: for the step that is next, or a later one."""
    returns: int
    """How often the run was resumed or went back to a checkpoint."""
    rolled_back: int
    """Consumed, and made void by a return to an earlier step: over the whole ledger."""
    reissued: int
    """Sampled again because a worker died: over the whole ledger."""
    excluded: int
    """Rows of the data that are never drawn."""
    problems: tuple[str, ...]
    """One sentence each; none where nothing was lost and nothing doubled."""


def audit(
    events: Sequence[Mapping[str, Any]],
    *,
    logged_steps: Collection[int] | None = None,
    state: Mapping[str, Any] | None = None,
) -> Audit:
    """Replay a ledger from its start, and hold it against what else is known of the run.

    `logged_steps` are those of `metrics.jsonl`. `state` is the driver's in the newest checkpoint: `step` and `order`
    (epoch, position, num_prompts).
    """
    replay = _Replay()
    for number, event in enumerate(events, start=1):
        if event["event"] == UNREADABLE:
            following = (later["event"] for later in events[number:] if later["event"] != UNREADABLE)
            if next(following, "begun") not in _AFTER_TORN:
                replay.problems.append(f"line {event['line']} of the ledger is not JSON, and no new start follows it")
            continue
        try:
            replay.apply(event)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            replay.problems.append(f"event {number} ({event['event']!r}) is malformed: {error!r}")
    if logged_steps is not None:
        replay.compare_metrics(logged_steps)
    if state is not None:
        replay.compare_state(state)
    return replay.result()


@dataclass
class _Draw:
    """Where a draw of the surviving history stands."""

    status: str
    step: int
    """For which it was issued or, once it is settled, in which that was."""
    responses: int = 0
    reason: str = ""


class _Replay:
    """The state of a run as its ledger tells it."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._has_begun = False
        self._draws: dict[int, _Draw] = {}
        self._prompts: dict[int, int] = {}
        """Of every draw that was ever issued, void or not."""
        self._excluded: set[int] = set()
        self._done = 0
        self._saved: set[int] = set()
        self._next_draw = 0
        self._returns = self._rolled_back = self._reissued = 0
        self._appliers: dict[str, Callable[..., None]] = {
            "begun": self._begin,
            "excluded": self._exclude,
            "issued": self._issue,
            "reissued": self._reissue,
            "consumed": self._consume,
            "dropped": self._drop,
            "saved": self._save,
        }

    def apply(self, event: Mapping[str, Any]) -> None:
        """Replay one event."""
        name = event["event"]
        fields = {key: value for key, value in event.items() if key not in ("event", "time")}
        if not self._has_begun and name not in _AFTER_TORN:
            self._has_begun = True  # told of once
            self.problems.append(f"the ledger does not begin with a start: its first event is {name!r}")
        self._appliers[name](**fields)

    def result(self) -> Audit:
        """Counts and problems so far."""
        draws = self._draws.values()
        return Audit(
            steps=self._done,
            drawn=len(draws),
            consumed=sum(draw.status == _CONSUMED for draw in draws),
            responses=sum(draw.responses for draw in draws),
            dropped=dict(Counter(draw.reason for draw in draws if draw.status == _DROPPED)),
            pending=sum(draw.status not in _SETTLED for draw in draws),
            returns=self._returns,
            rolled_back=self._rolled_back,
            reissued=self._reissued,
            excluded=len(self._excluded),
            problems=tuple(self.problems),
        )

    def _begin(self, step: int, next_draw: int) -> None:
        if self._has_begun:
            self._returns += 1
        self._has_begun = True
        if step > self._done:
            self.problems.append(f"the run went on from step {step}, but only {self._done} steps had been done")
        # A driver that dies between the checkpoint and its line in the ledger leaves the newest step without one.
        elif step not in self._saved and step not in (0, self._done):
            self.problems.append(f"the run went back to step {step}, of which no checkpoint is told")
        void = [d for d, draw in self._draws.items() if draw.status not in _SETTLED or draw.step > step]
        self._rolled_back += sum(self._draws[d].status == _CONSUMED for d in void)
        for d in void:
            del self._draws[d]
        place = f"step {step}, draw {next_draw}"
        self._report(
            set(range(next_draw)) - self._draws.keys(),
            f"lost at the start from {place}: neither consumed nor dropped by then",
        )
        doubled = [d for d in self._draws if d >= next_draw]
        self._report(doubled, f"doubled at the start from {place}: settled by then, and drawn again")
        for d in doubled:
            del self._draws[d]
        self._done, self._next_draw = step, next_draw
        self._saved = {saved for saved in self._saved if saved <= step} | ({step} if step else set())

    def _exclude(self, prompts: Sequence[int], reason: str) -> None:
        self._excluded.update(prompts)

    def _issue(self, step: int, draws: Mapping[Any, int]) -> None:
        prompts = {int(d): prompt for d, prompt in draws.items()}
        if step <= self._done:
            self.problems.append(f"{_named(prompts)} issued for step {step}, when {self._done} steps were done already")
        new = sorted(d for d in prompts if d not in self._draws)
        if new and new != list(range(self._next_draw, self._next_draw + len(new))):
            self.problems.append(f"a gap in the draws: {_named(new)} issued where draw {self._next_draw} was the next")
        again = prompts.keys() & self._draws.keys()
        self._report(again, f"issued a second time (for step {step})")
        self._report(
            [d for d, prompt in prompts.items() if self._prompts.get(d, prompt) != prompt],
            "issued again after a return, as another prompt",
        )
        self._report(
            [d for d, prompt in prompts.items() if prompt in self._excluded], "issued with a prompt that is excluded"
        )
        self._prompts |= prompts
        self._draws |= {d: _Draw(_IN_FLIGHT, step) for d in prompts if d not in again}
        self._next_draw = max([self._next_draw, *(d + 1 for d in new)])

    def _reissue(self, draws: Sequence[int], worker: str, reason: str) -> None:
        idle = [d for d in draws if d not in self._draws or self._draws[d].status in _SETTLED]
        self._report(idle, f"sampled again after the loss of {worker}, but not in flight")
        self._reissued += len(draws)

    def _consume(self, step: int, draws: Mapping[Any, int]) -> None:
        if step <= self._done:
            self.problems.append(f"step {step} was consumed when {self._done} steps were done already")
        elif step > self._done + 1:
            missing = f"step {self._done + 1} is" if step == self._done + 2 else f"{step - self._done - 1} steps are"
            self.problems.append(f"step {step} was consumed after step {self._done}: {missing} missing")
        self._done = max(self._done, step)
        self._settle({int(d): _Draw(_CONSUMED, step, responses=n) for d, n in draws.items()})
        left = [d for d, draw in self._draws.items() if draw.status == _IN_FLIGHT and draw.step == step]
        self._report(left, f"left out of step {step}: issued for it, and neither consumed nor dropped")

    def _drop(self, step: int, draws: Sequence[int], reason: str) -> None:
        if step != self._done + 1:
            self.problems.append(f"{_named(draws)} dropped in step {step}, when {self._done} steps were done")
        self._settle({d: _Draw(_DROPPED, step, reason=reason) for d in draws})

    def _save(self, step: int) -> None:
        if step != self._done:
            self.problems.append(f"a checkpoint of step {step} was saved when {self._done} steps were done")
        self._saved.add(step)

    def _settle(self, settled: Mapping[int, _Draw]) -> None:
        for d, draw in settled.items():
            now, then = f"{draw.status} in step {draw.step}", self._draws.get(d)
            if then is None or d not in self._prompts:
                self.problems.append(f"draw {d} was {now} without being issued")
            elif then.status in _SETTLED:
                self.problems.append(f"draw {d} was {now} after it had been {then.status} in step {then.step}")
            elif draw.step != then.step:
                self.problems.append(f"draw {d} was {now}, and issued for step {then.step}")
        self._draws |= settled

    def compare_metrics(self, logged_steps: Collection[int]) -> None:
        """Every step that was logged was consumed, and the other way round."""
        logged = {step for step in logged_steps if step >= 1}
        newest = max(logged, default=0)
        # The driver may have died before it logged the newest step, or, in a resume, after it had cut the metrics back
        # to a checkpoint and before it began anew in the ledger.
        if newest != self._done - 1 and newest not in self._saved | {self._done}:
            self.problems.append(f"metrics.jsonl ends with step {newest}, the ledger with step {self._done}")
        missing = sorted(set(range(1, newest + 1)) - logged)
        if missing:
            self.problems.append(f"{_named(missing, 'step')} consumed, and missing in metrics.jsonl")

    def compare_state(self, state: Mapping[str, Any]) -> None:
        """What was settled by the step of a checkpoint lies before the place from which it draws on; and an epoch
        draws no prompt twice."""
        step, order = state["step"], state["order"]
        num_prompts = order["num_prompts"]
        next_draw = order["epoch"] * num_prompts + order["position"]
        if step > self._done:
            self.problems.append(f"the newest checkpoint is of step {step}, the ledger ends with step {self._done}")
        elif step not in self._saved and step not in (0, self._done):
            self.problems.append(f"the newest checkpoint is of step {step}, and the ledger tells of none")
        settled = {d for d, draw in self._draws.items() if draw.status in _SETTLED and draw.step <= step}
        place = f"the checkpoint of step {step}, which draws on at {next_draw}"
        self._report(set(range(next_draw)) - settled, f"lost by {place}: before that, and not settled")
        self._report({d for d in settled if d >= next_draw}, f"doubled by {place}: settled, and to come again")
        drawn = {d: self._prompts[d] for d in sorted(self._draws) if d in self._prompts}
        times = Counter((d // num_prompts, prompt) for d, prompt in drawn.items())
        self._report(
            [d for d, prompt in drawn.items() if times[d // num_prompts, prompt] > 1],
            "drawn with a prompt that the same epoch holds twice",
        )
        if (found := len(set(drawn.values()))) > num_prompts:
            self.problems.append(f"{found} different prompts were drawn, and there are {num_prompts} to train on")

    def _report(self, draws: Iterable[int], what: str) -> None:
        if draws := sorted(draws):
            self.problems.append(f"{_named(draws)} {what}")


def _named(numbers: Iterable[int], noun: str = "draw") -> str:
    """`draw 3 was`, `draws 3, 4 and 5 were`, or the first few and how many more."""
    ordered = sorted(numbers)
    if not ordered:
        return f"no {noun} was"
    if len(ordered) == 1:
        return f"{noun} {ordered[0]} was"
    shown, rest = ordered[:_NUM_SHOWN], len(ordered) - _NUM_SHOWN
    last = f"{rest} more" if rest > 0 else str(shown.pop())
    return f"{noun}s {', '.join(map(str, shown))} and {last} were"

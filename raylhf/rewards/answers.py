"""Verification of a final answer against the data row's reference."""

import logging
import multiprocessing
import re
import signal
import threading
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any, Literal

from raylhf.batch import Prompt, RewardOutput, Rollouts
from raylhf.rewards.rules import REGEX_LIMIT_S, compile_pattern
from raylhf.rewards.validity import score_each

MAX_CHARACTERS = 2000
"""Of an unmarked response's end, where math-verify looks for an answer; its patterns slow down on long texts."""
COMPARISON_LIMIT_S = 5.0
"""For reading and comparing one answer: 9^9^9^9 is short to write and never done."""
START_LIMIT_S = 120.0
"""For the child process to import sympy, on a busy machine."""


class AnswerReward:
    r"""1 where the response's final answer equals the reference, else 0; a response without an answer is wrong: 0.

    The final answer is the last match of `pattern`. Without a pattern, `text` takes the last line; `math` takes the
    last \boxed{...} or `#### number`, whichever comes later, so that of several boxes only the last counts, and where
    there is neither what math-verify finds in the last MAX_CHARACTERS characters.

    `math` reads fractions, decimals, thousands separators, currencies, units and LaTeX. A percentage equals both its
    number and its hundredth; decimals are compared to six places. A reference made of words is compared as text.
    A row without a reference, and a comparison that takes over COMPARISON_LIMIT_S, have no score.
    """

    def __init__(self, *, answer_key: str, match: Literal["math", "text"], pattern: str | None):
        self._answer_key = answer_key
        self._pattern = None if pattern is None else compile_pattern(pattern, "the answer reward")
        if self._pattern is not None and self._pattern.groups == 0:
            raise ValueError(f"the answer reward's pattern={pattern!r} has no group (...) to hold the answer; add one")
        self._math = math_process() if match == "math" else None

    def score(self, rollouts: Rollouts) -> RewardOutput:
        return score_each("answer", rollouts, self.score_response)

    def score_response(self, prompt: Prompt, text: str) -> float:
        """The score of one response."""
        reference = self._reference(prompt)
        if self._math is None:
            answer = last_line(text) if self._pattern is None else self._last_match(text)
            return float(answer is not None and same_text(reference, answer))
        answer = marked_answer(text) if self._pattern is None else self._last_match(text)
        if WORDS.fullmatch(reference):  # math-verify would multiply its letters, so that `yes` equals `sey`
            return float(answer is not None and same_text(reference, answer))
        if answer is not None:
            return float(self._math.is_equal(reference, answer, is_marked=True))
        if self._pattern is None:
            return float(self._math.is_equal(reference, text[-MAX_CHARACTERS:], is_marked=False))
        return 0.0

    def _reference(self, prompt: Prompt) -> str:
        value = prompt.metadata.get(self._answer_key)
        reference = "" if value is None else str(value).rsplit("####", 1)[-1].strip()
        if not reference:
            raise ValueError(
                f"the data row has no reference in its field {self._answer_key!r}; set answer_key to the field that has"
            )
        return reference

    def _last_match(self, text: str) -> str | None:
        assert self._pattern is not None
        answers = [match[1] for match in self._pattern.finditer(text, timeout=REGEX_LIMIT_S)]
        return answers[-1] if answers else None


WORDS = re.compile(r"[^\W\d_]{2,}(?:[\s'-]+[^\W\d_]+)*")
BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
MARKED = re.compile(r"####[ \t]*(?=[-+*.\\($\u20ac\u00a3\u00a5\d])([^\n]+)")
"""GSM8K's form. A Markdown heading of that level seldom starts with a number."""
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf)\s*\{([^{}]*)\}")
END_SIGNS = " .,;:!?\"'()[]{}*_`$"


def marked_answer(text: str) -> str | None:
    r"""What stands in the last \boxed{...} or after the last `#### `, whichever comes later; None without either."""
    box_end, answer = last_box(text)
    for match in MARKED.finditer(text, box_end):
        answer = match[1].strip("* \t\r").rstrip(".")
    return answer


def last_box(text: str) -> tuple[int, str | None]:
    r"""End and content of the \boxed{...} that is closed last, braces inside it balanced; (0, None) without one."""
    end, content = 0, None
    box_starts: list[int | None] = []
    for token in BRACES.finditer(text):
        if token[0].startswith("\\boxed"):
            box_starts.append(token.end())
        elif token[0] == "{":
            box_starts.append(None)
        elif token[0] == "}" and box_starts and (start := box_starts.pop()) is not None:
            end, content = token.end(), text[start : token.start()]
    return end, content


def last_line(text: str) -> str | None:
    """The last line that is not blank, None where all are."""
    return text.strip().rsplit("\n", 1)[-1] or None


def same_text(reference: str, answer: str) -> bool:
    """Equal up to case, white space and punctuation at the ends; signs of a number (- + %) stay."""
    return normal_text(reference) == normal_text(answer)


def normal_text(text: str) -> str:
    words = " ".join(TEXT_COMMAND.sub(r"\1", text).casefold().split())
    return words.lstrip(END_SIGNS + "#").rstrip(END_SIGNS)


class MathProcess:
    """math-verify in a child process, which is killed where a comparison takes too long.

    math-verify's own time limits are signals, which reach the main thread alone and cannot interrupt a power of large
    integers. A reward worker scores in another thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: Any = None
        self._connection: Connection

    def is_equal(self, reference: str, answer: str, *, is_marked: bool) -> bool:
        """`math_equal` within COMPARISON_LIMIT_S, else TimeoutError; ValueError for a reference that is no maths."""
        with self._lock:
            if self._process is None:
                self._start()
            result = self._ask((reference, answer, is_marked), COMPARISON_LIMIT_S)
        if isinstance(result, str):
            raise ValueError(result)
        return result

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, child_end = context.Pipe()
        self._process = context.Process(target=answer_questions, args=(child_end,), daemon=True)
        self._process.start()
        child_end.close()
        self._ask(None, START_LIMIT_S)

    def _ask(self, question: tuple[str, str, bool] | None, limit_s: float) -> bool | str:
        try:
            self._connection.send(question)
            if self._connection.poll(limit_s):
                return self._connection.recv()
        except (EOFError, OSError) as error:
            self._stop()
            raise RuntimeError(
                "the process that compares answers has ended; the next response starts another"
            ) from error
        self._stop()
        raise TimeoutError(f"the answer could not be compared within {limit_s:g} s")

    def _stop(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()
        self._process = None


@lru_cache(maxsize=1)
def math_process() -> MathProcess:
    """One for all answer rewards of a worker: sympy alone takes 100 MB."""
    return MathProcess()


def answer_questions(connection: Connection) -> None:
    """The child process: answers (reference, answer, is_marked), and None once it is ready, until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupted run ends through its parent, without a traceback here
    import math_verify  # noqa: F401, the import belongs to START_LIMIT_S

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        try:
            connection.send(question is None or math_equal(*question))
        except ValueError as error:
            connection.send(str(error))


def math_equal(reference: str, answer: str, is_marked: bool) -> bool:
    """Whether `answer` equals `reference`. A marked answer stands alone, any other in a text that ends with it."""
    from math_verify import parse, verify

    expected = read_math(reference)
    if not expected:
        raise ValueError(f"the reference {reference[:80]!r} is no number or expression; use match: text")
    found = read_math(answer) if is_marked else parse(answer, parsing_timeout=None)  # type: ignore[arg-type]
    return bool(verify(expected, found, timeout_seconds=None))


PROSE = re.compile(r"[^\W\d_]{2,}\s+[^\W\d_]{2,}|^[^\w\\]*\d[\d.,/]*\s+[^\W\d_]{3,}[^\d\\^=+]*$")
"""Two words in a row, or a quantity: a number and a word."""


@lru_cache(maxsize=256)
def read_math(text: str) -> list[Any]:
    r"""math-verify's readings of an answer that stands alone, [] where it has none.

    In a box `x^2 + 1` is read as a whole; outside of one only its last number would be. Prose (`12 eggs`) is the
    reverse: in a box its letters would be multiplied.
    """
    from math_verify import parse

    text = " ".join(text[-MAX_CHARACTERS:].split())
    plain = parse(text, parsing_timeout=None) if PROSE.search(text) else []  # type: ignore[arg-type]
    return plain or parse(rf"\boxed{{{text}}}", parsing_timeout=None)  # type: ignore[arg-type]

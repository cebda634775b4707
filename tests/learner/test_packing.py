"""Several rows on one line: what is where, and that no row sees another."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from preference_stand_ins import RESPONSES, make_preference_config
from reward_stand_ins import on_ranks, write_rows

from raylhf.learner.microbatch import Packing, make_micro_batch, pack_lines
from raylhf.models.policy import PolicyModel, load_critic, load_policy
from raylhf.models.tiny import write_tiny_model


class Rows:
    """Prompts and responses of given lengths."""

    def __init__(self, *lengths: tuple[int, int]) -> None:
        rng = torch.Generator().manual_seed(0)
        self.prompt_ids, self.response_ids = (
            [torch.randint(5, 250, (pair[side],), generator=rng).numpy() for pair in lengths] for side in (0, 1)
        )


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 12))
def test_every_row_stands_on_one_line_that_holds_it(sizes, line_tokens):
    lines = pack_lines(sizes, line_tokens)
    assert sorted(i for line in lines for i in line) == list(range(len(sizes)))
    assert all(len(line) == 1 or sum(sizes[i] for i in line) <= line_tokens for line in lines)
    # First fit leaves no two lines half empty.
    loads = sorted(sum(sizes[i] for i in line) for line in lines)
    assert len(loads) < 2 or loads[0] + loads[1] > line_tokens


def test_a_line_holds_rows_one_after_the_other():
    rows = Rows((2, 3), (1, 2), (3, 4), (1, 1))
    batch = make_micro_batch(rows, [0, 1, 2, 3], torch.device("cpu"), packing=Packing(9))
    assert batch.position_ids is not None
    # By first fit: 7 + 2, then 5 + 3; the second line is padded by one token.
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1], [0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert batch.row_lines.tolist() == [1, 1, 0, 0]
    assert batch.ends.tolist() == [4, 7, 6, 8]
    assert batch.tokens[batch.lines, batch.positions + 1].tolist() == batch.targets.tolist()
    assert batch.tokens[1, 5:8].tolist() == [*rows.prompt_ids[1], *rows.response_ids[1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return write_tiny_model(tmp_path_factory.mktemp("packing") / "tiny")


LAYOUT = {"dtype": torch.float32, "trust_remote_code": False}
ROWS = Rows((5, 7), (9, 3), (2, 2), (11, 1), (1, 13))


@pytest.mark.parametrize(("attention", "one_line"), [("sdpa", False), ("sdpa", True), ("eager", False)])
def test_packed_rows_have_the_numbers_of_rows_apart(folder, attention, one_line):
    policy = load_policy(folder, attention=attention, logprob_chunk=4, with_value_head=False, **LAYOUT)
    critic = load_critic(folder, attention=attention, **LAYOUT)
    torch.nn.init.normal_(critic.value_head.linear.weight)
    packed, padded = (
        make_micro_batch(ROWS, range(5), torch.device("cpu"), packing=packing)
        for packing in (Packing(30, one_line=one_line), None)
    )
    assert len(packed.tokens) == (1 if one_line else 2) and len(padded.tokens) == 5
    found, expected = ([], [])
    for batch, numbers in ((packed, found), (padded, expected)):
        where = batch.tokens, batch.lines, batch.positions
        logprobs, entropies, _ = policy(*where, batch.targets, temperature=0.7, position_ids=batch.position_ids)
        values = critic(*where, batch.position_ids)
        numbers.extend(batch.scatter(flat, 13) for flat in (logprobs, entropies, values))
        numbers.append(critic(batch.tokens, batch.row_lines, batch.ends, batch.position_ids))
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-5)


def across_rows(self: PolicyModel, tokens: Any, lines: Any, positions: Any, position_ids: Any = None) -> torch.Tensor:
    """A model that does not know where a packed row begins."""
    return self.lm.base_model(input_ids=tokens, use_cache=False).last_hidden_state[lines, positions]


def refusal(ranks, config):
    """What starting the learner says."""
    PolicyModel.hidden = across_rows  # in this process, which ends with the test
    try:
        ranks.start(config)
    except ValueError as error:
        return str(error)
    return ""


def test_a_model_whose_rows_see_each_other_is_refused(folder, tmp_path):
    path = write_rows(tmp_path / "responses.jsonl", list(RESPONSES))
    config = make_preference_config(
        folder, path, data={"kind": "responses"}, objective={"kind": "sft", "packing": True}
    )
    (said,) = on_ranks(refusal, 1, config)
    assert said.startswith("objective.packing: examples that share a line")
    assert said.endswith("set objective.packing: false")

"""The ledger's file: what is on disk when, and what a death in the middle of a line leaves."""

import json
import os

import pytest

from raylhf.driver.audit import audit
from raylhf.driver.ledger import Ledger, read_ledger, set_ledger_aside


def test_events_come_back_in_order_each_readable_before_the_next(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.begin(0, next_draw=0)
    ledger.exclude([4, 7], "too long")
    ledger.issue(1, {0: 12, 1: 3})
    assert len(read_ledger(tmp_path)) == 3
    ledger.reissue([1], "rollout 0", "died")
    ledger.drop(1, [1], "no valid score")
    ledger.consume(1, {0: 8})
    ledger.save(1)
    ledger.close()
    events = read_ledger(tmp_path)
    times = [event.pop("time") for event in events]
    assert times == sorted(times)
    assert events == [
        {"event": "begun", "step": 0, "next_draw": 0},
        {"event": "excluded", "prompts": [4, 7], "reason": "too long"},
        {"event": "issued", "step": 1, "draws": {"0": 12, "1": 3}},
        {"event": "reissued", "draws": [1], "worker": "rollout 0", "reason": "died"},
        {"event": "dropped", "step": 1, "draws": [1], "reason": "no valid score"},
        {"event": "consumed", "step": 1, "draws": {"0": 8}},
        {"event": "saved", "step": 1},
    ]


def test_starts_and_consumption_wait_for_the_disk(tmp_path, monkeypatch):
    ledger, synced = Ledger(tmp_path), []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(read_ledger(tmp_path)[-1]["event"]))
    ledger.begin(0, next_draw=0)
    ledger.issue(1, {0: 0})
    ledger.consume(1, {0: 1})
    ledger.save(1)
    assert synced == ["begun", "consumed"]


def test_a_death_at_any_byte_of_the_last_line_is_no_problem_before_and_after_the_next_start(tmp_path):
    file = tmp_path / "ledger.jsonl"
    ledger = Ledger(tmp_path)
    ledger.begin(0, next_draw=0)
    ledger.issue(1, {0: 5})
    whole, intact = len(file.read_bytes()), read_ledger(tmp_path)
    ledger.consume(1, {0: 8})
    ledger.close()
    content = file.read_bytes()
    for end in range(whole, len(content) - 1):
        file.write_bytes(content[:end])
        assert read_ledger(tmp_path) == intact
        again = Ledger(tmp_path)
        again.begin(0, next_draw=0)
        again.issue(1, {0: 5})
        again.close()
        found = audit(read_ledger(tmp_path))
        assert (found.problems, found.drawn, found.consumed, found.returns) == ((), 1, 0, 1), end
    file.write_bytes(content[:-1])  # only the newline is missing: the event counts
    assert read_ledger(tmp_path)[-1]["event"] == "consumed"
    Ledger(tmp_path).close()
    assert file.read_bytes() == content


def test_a_line_that_is_no_event_in_the_middle_is_a_problem(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.begin(0, next_draw=0)
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"event": "iss\n')
    ledger.issue(1, {0: 5})
    ledger.close()
    assert audit(read_ledger(tmp_path)).problems == ("line 2 of the ledger is not JSON, and no new start follows it",)


def test_a_run_that_starts_anew_starts_a_new_ledger(tmp_path):
    set_ledger_aside(tmp_path)
    ledger = Ledger(tmp_path)
    ledger.begin(0, next_draw=0)
    ledger.close()
    set_ledger_aside(tmp_path)
    assert json.loads((tmp_path / "ledger.1.jsonl").read_text())["event"] == "begun"
    with pytest.raises(ValueError, match=r"has no ledger.jsonl; give the folder"):
        read_ledger(tmp_path)

"""The scorer and its deployment, without a Ray that runs."""

import asyncio
import sys
import threading
from typing import Any

import pytest

from raylhf.cluster.serving import OPEN_REQUESTS, Piece, Scorer, reward_application
from raylhf.config.reward import RewardPlaneConfig
from raylhf.config.service import ServiceConfig
from raylhf.rewards.texts import TextSample

PLANE = {"graph": {"kind": "function", "path": "waiting:score"}}


@pytest.fixture
def gate(tmp_path, monkeypatch):
    """An event for which every score waits."""
    (tmp_path / "waiting.py").write_text(
        "import threading\ngate = threading.Event()\ndef score(prompt, response, metadata):\n    return gate.wait(30)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import waiting  # pyright: ignore[reportMissingImports]

    yield waiting.gate
    monkeypatch.delitem(sys.modules, "waiting")


def test_a_scorer_is_unhealthy_while_a_batch_is_in_work_for_too_long(gate: threading.Event):
    async def run():
        scorer = Scorer(RewardPlaneConfig.model_validate(PLANE), max_batch_size=4, batch_wait_s=0.0, stuck_after_s=0.5)
        assert await scorer.is_ready()
        scoring = asyncio.create_task(scorer.score_pieces([Piece([TextSample((), "a")], 0)]))
        await asyncio.sleep(0.1)
        assert await scorer.is_ready()
        await asyncio.sleep(0.6)
        await asyncio.sleep(0.6)
        with pytest.raises(RuntimeError, match="the scorer is stuck: a batch is in work for 1 s"):
            scorer.check_health()
        with pytest.raises(RuntimeError, match="stuck"):
            await scorer.is_ready()
        gate.set()
        (piece,) = await scoring
        assert piece.scored.scores == [1.0]
        assert await scorer.is_ready()

    asyncio.run(run())


@pytest.mark.parametrize(("batch", "queue"), [(64, OPEN_REQUESTS), (1, 1024)])
def test_the_scorers_queue_has_an_end_and_room_for_the_longest_request(batch, queue):
    config = ServiceConfig.model_validate(
        {"reward": {"graph": {"kind": "sentiment"}}, "serve": {"max_batch_size": batch}}
    )
    endpoint: Any = reward_application(config, b"digest")._bound_deployment
    scorer = endpoint.init_args[2]._bound_deployment
    assert scorer._deployment_config.max_queued_requests == queue
    assert scorer.init_kwargs["stuck_after_s"] == config.serve.request_timeout_s

"""The limits of the reward server's HTTP, in a server of the test's own; test_serving.py has the real one."""

import asyncio
import time
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from raylhf.cluster import http_limits
from raylhf.cluster.http_limits import LimitedHttp

GET = b"GET / HTTP/1.1\r\nHost: x\r\n"
SOCKET = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eHh4\r\n"


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    monkeypatch.setattr(http_limits, "HEAD_TIMEOUT_S", 0.5)
    monkeypatch.setattr(http_limits, "MAX_HEAD_BYTES", 200)
    monkeypatch.setattr(http_limits, "MAX_CONNECTIONS", 2)


async def app(scope, receive, send):
    """Answers 200 with the length of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        size, more = size + len(message["body"]), message["more_body"]
    body = str(size).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


def talk(conversation):
    """What `conversation(connect)` returns, where connect() opens a connection to the server."""

    async def run():
        config, state = uvicorn.Config(app, lifespan="off", log_config=None), ServerState()
        server = await asyncio.get_running_loop().create_server(lambda: LimitedHttp(config, state, {}), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, asyncio.timeout(20):
            return await conversation(lambda: asyncio.open_connection("127.0.0.1", port))

    return asyncio.run(run())


async def ask(connection: Any, *pieces: bytes) -> str:
    """Status and body of the answer to what is sent in pieces."""
    reader, writer = connection
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0.05)
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
    return f"{head.split(' ')[1]} {(await reader.readexactly(length)).decode()}"


def test_a_request_in_pieces_and_further_ones_on_its_connection_are_answered():
    async def conversation(connect):
        connection = await connect()
        post = b"POST / HTTP/1.1\r\nContent-Length: 500\r\n\r\n" + b"x" * 300
        answers = [await ask(connection, GET[:20], GET[20:], b"\r\n"), await ask(connection, post, b"y" * 200)]
        await asyncio.sleep(1.0)  # between two requests the limit on heads does not count
        return [*answers, await ask(connection, GET + b"\r\n")]

    assert talk(conversation) == ["200 0", "200 500", "200 0"]


@pytest.mark.parametrize("before", [(), (GET + b"\r\n",)])
@pytest.mark.parametrize("pieces", [(b"X: " + b"x" * 300,), (b"X: ", *[b"x" * 50] * 4)])
def test_a_long_head_is_refused_first_or_later_on_a_connection(before, pieces):
    async def conversation(connect):
        connection = await connect()
        for request in before:
            await ask(connection, request)
        return await ask(connection, GET, *pieces), await connection[0].read()

    answer, rest = talk(conversation)
    assert (answer, rest) == ('431 {"error":"the headers are longer than 200 bytes"}', b"")


@pytest.mark.parametrize("begun", [b"", GET, GET + b"\r\n" + GET])
def test_a_head_that_does_not_end_in_time_is_refused(begun):
    async def conversation(connect):
        connection, started = await connect(), time.monotonic()
        answer = await ask(connection, begun)
        while answer == "200 0":
            answer = await ask(connection)
        return answer, await connection[0].read(), time.monotonic() - started

    answer, rest, seconds = talk(conversation)
    assert (answer, rest) == ('408 {"error":"the headers were not there within 0.5 s"}', b"")
    assert 0.4 < seconds < 5


def test_connections_over_the_limit_are_turned_away_until_others_end():
    async def conversation(connect):
        first, second = await connect(), await connect()
        refused = await ask(await connect())
        first[1].close()
        await asyncio.sleep(0.1)
        return refused, await ask(second, GET + b"\r\n"), await ask(await connect(), GET + b"\r\n")

    assert talk(conversation) == ('503 {"error":"too many connections are open; come again"}', "200 0", "200 0")


def test_no_web_socket_is_opened():
    async def conversation(connect):
        return await ask(await connect(), GET, SOCKET, b"\r\n")

    assert talk(conversation).startswith("200")

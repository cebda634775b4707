"""What Ray Serve's HTTP server lacks: limits on a request's head, in bytes and in time, and on open connections.

Ray Serve hands its server (uvicorn) no such settings; it does call a function of ours where the server starts.
"""

import asyncio
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

CALLBACK_VARIABLE = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "raylhf.cluster.http_limits.limit_http"}
"""Of the processes of Ray Serve."""
MAX_HEAD_BYTES = 32_768
"""Request line and headers."""
HEAD_TIMEOUT_S = 10.0
"""From the connection, or from the first byte of a further request on it, to the end of its headers."""
MAX_CONNECTIONS = 1024


def limit_http() -> list[Any]:
    """Make uvicorn, in this process, use the protocol below; returns the middleware that Ray Serve is to add: none."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{LimitedHttp.__name__}"
    return []


class LimitedHttp(HttpToolsProtocol):
    """HTTP/1.1 for callers that are not trusted: heads in time and of bounded size, and no web sockets."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ws_protocol_class = None
        self._is_in_head = True
        self._room = MAX_HEAD_BYTES
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(503, "too many connections are open; come again")
        else:
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_in_head:
            head, data = data[: self._room], data[self._room :]
            self._room -= len(head)
            super().data_received(head)
            if self._is_in_head and self._room == 0:
                self._refuse(431, f"the headers are longer than {MAX_HEAD_BYTES} bytes")
        if data and not self.transport.is_closing():
            super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:
            self._start_timer()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_in_head, self._room = True, MAX_HEAD_BYTES

    def _start_timer(self) -> None:
        sentence = f"the headers were not there within {HEAD_TIMEOUT_S:g} s"
        self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, 408, sentence)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: int, sentence: str) -> None:
        body = f'{{"error":"{sentence}"}}'.encode()
        length = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
        self.transport.write(STATUS_LINE[status] + length + body)
        self.transport.close()

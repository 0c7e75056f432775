"""An HTTP server with OpenAI's chat completions, whose answers a test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Messages = list[dict[str, str]]
Said = str | int | bytes | tuple[int, bytes]
"""The assistant's text, an HTTP status, a whole body (JSON where it begins with a brace, else a web page), or both."""
Answer = Callable[[Messages], Said]


@dataclass
class ChatServer:
    """A running server.

    Attributes:
        answer: what it says; may be changed at any time.
        questions: the bodies of all requests.
        keys: their Authorization headers.
        busiest: most requests that were under way at a time.
        retry_after: header of status 429.
    """

    base_url: str
    answer: Answer
    questions: list[dict[str, object]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    busiest: int = 0
    retry_after: str = "1"
    running: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def reply(self, body: dict[str, object], key: str | None) -> Said:
        with self.lock:
            self.questions.append(body)
            self.keys.append(key)
            self.running += 1
            self.busiest = max(self.busiest, self.running)
        try:
            return self.answer(body["messages"])  # type: ignore[arg-type]
        finally:
            with self.lock:
                self.running -= 1


@contextmanager
def chat_server(answer: Answer) -> Iterator[ChatServer]:
    """Serve on a free port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said = state.reply(body, self.headers["Authorization"]) if self.path == "/v1/chat/completions" else 404
            status, data = _response(said)
            self.send_response(status)
            self.send_header("Content-Type", "application/json" if data.startswith(b"{") else "text/html")
            self.send_header("Content-Length", str(len(data)))
            if status == 429:
                self.send_header("Retry-After", state.retry_after)
            self.end_headers()
            # A caller that did not wait is part of some tests.
            with suppress(ConnectionError):
                self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
            """Nothing: what a test's server sees is in `questions`."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state = ChatServer(f"http://127.0.0.1:{server.server_address[1]}/v1", answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def _response(said: Said) -> tuple[int, bytes]:
    """HTTP status and body."""
    match said:
        case tuple():
            return said
        case bytes():
            return 200, said
        case int():
            return said, json.dumps({"error": {"message": "told to fail"}}).encode()
        case str():
            return 200, json.dumps(_reply(said)).encode()


def _reply(text: str) -> dict[str, object]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}

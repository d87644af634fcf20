"""Public test doubles: a tier that follows a script, and an OpenAI-compatible HTTP server that does.

A server that replays references stands in for a frontier model where none can be called; name it the *reference
frontier* wherever a number depends on it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import log
from typing import Any

from .errors import TierError
from .types import Call, Completion

__all__ = ["ScriptedServer", "ScriptedTier", "count_tokens"]

Reply = Completion | str
Replies = Mapping[str, Reply] | Callable[[Mapping[str, Any]], Reply]


def count_tokens(text: str) -> int:
    """An estimate: one token for every four characters, at least one."""
    return max(1, -(-len(text) // 4))


@dataclass(eq=False)
class ScriptedTier:
    """A tier that gives the scripted completion of a query's text, and remembers its calls.

    Attributes:
        script: text of the query -> completion, plain text, or an error to raise.
        default: for every other query; None fails.
    """

    script: Mapping[str, Completion | str | Exception] = field(default_factory=dict)
    default: Completion | str | Exception | None = None
    calls: list[Call] = field(default_factory=list)

    def __call__(self, call: Call) -> Completion:
        """The scripted reply; what is not scripted fails."""
        self.calls.append(call)
        reply = self.script.get(call.query.text, self.default)
        if reply is None:
            raise TierError(f"nothing scripted for {call.query.text!r}", call.tier)
        if isinstance(reply, Exception):
            raise reply
        return Completion(reply) if isinstance(reply, str) else reply


@dataclass(frozen=True)
class _Behaviour:
    delay: float = 0.0
    status: int | None = None
    failures_left: int = 0
    nonsense: bool = False


class ScriptedServer:
    """An OpenAI-compatible chat-completion server on loopback; a context manager.

    Replies with what is scripted for the last user message, counts tokens with `count_tokens`, and streams when
    asked to.

    Args:
        replies: last user message -> reply, or a function of the whole request. A reply is a text, or a completion
            whose `mean_logprob` every token gets; that of a text is log 0.99. A message without reply is answered
            with status 404.
    """

    def __init__(self, replies: Replies) -> None:
        self.replies = replies
        self.requests: list[dict[str, Any]] = []
        self._behaviour = _Behaviour()
        self._lock = threading.Lock()
        self._http: ThreadingHTTPServer | None = None

    def slow(self, seconds: float) -> None:
        """Wait before every reply."""
        self._behaviour = replace(self._behaviour, delay=seconds)

    def fail(self, status: int = 500, times: int = 1) -> None:
        """Answer the next `times` requests with an HTTP error."""
        self._behaviour = replace(self._behaviour, status=status, failures_left=times)

    def talk_nonsense(self, on: bool = True) -> None:
        """Answer with something that is no chat completion."""
        self._behaviour = replace(self._behaviour, nonsense=on)

    @property
    def url(self) -> str:
        """Base URL for a client, while the server runs."""
        if self._http is None:
            raise RuntimeError("the server is not running: use it in a with statement")
        return f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self) -> ScriptedServer:
        self._http = _Http(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._http.serve_forever, name="scripted-server", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._http = None

    def _next(self, request: dict[str, Any]) -> _Behaviour:
        with self._lock:
            self.requests.append(request)
            behaviour = self._behaviour
            if behaviour.failures_left:
                self._behaviour = replace(behaviour, failures_left=behaviour.failures_left - 1)
        return behaviour

    def _reply(self, request: Mapping[str, Any]) -> Completion | None:
        if callable(self.replies):
            reply: Reply | None = self.replies(request)
        else:
            asked = (m["content"] for m in reversed(request["messages"]) if m.get("role") == "user")
            reply = self.replies.get(next(asked, ""))
        return Completion(reply) if isinstance(reply, str) else reply


def _token(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": log(0.99) if logprob is None else logprob, "bytes": None, "top_logprobs": []}


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def _handler(server: ScriptedServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def log_message(self, *_: object) -> None: ...

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            behaviour = server._next(request)
            time.sleep(behaviour.delay)
            if behaviour.failures_left:
                self._json({"error": {"message": "scripted failure"}}, behaviour.status or 500)
            elif behaviour.nonsense:
                self._send(b"<html>not a completion</html>", "text/html")
            elif (reply := server._reply(request)) is None:
                self._json({"error": {"message": "nothing scripted for this message"}}, 404)
            else:
                self._complete(request, reply)

        def _complete(self, request: dict[str, Any], reply: Completion) -> None:
            text = reply.text
            tokens = [_token(text[i : i + 4], reply.mean_logprob) for i in range(0, len(text), 4)]
            prompt = sum(count_tokens(str(message.get("content") or "")) for message in request["messages"])
            usage = {
                "prompt_tokens": prompt,
                "completion_tokens": count_tokens(text),
                "total_tokens": prompt + count_tokens(text),
            }
            head = {"id": "chatcmpl-scripted", "created": int(time.time()), "model": request.get("model", "scripted")}
            if request.get("stream"):
                self._stream(head, request, tokens, usage)
                return
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "logprobs": {"content": tokens} if request.get("logprobs") else None,
                "finish_reason": "stop",
            }
            self._json({**head, "object": "chat.completion", "choices": [choice], "usage": usage})

        def _stream(
            self, head: dict[str, Any], request: dict[str, Any], tokens: list[dict[str, Any]], usage: dict[str, int]
        ) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            self.close_connection = True
            for token in tokens:
                logprobs = {"content": [token]} if request.get("logprobs") else None
                delta = {"role": "assistant", "content": token["token"]}
                self._event(head, [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": None}])
            self._event(head, [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}])
            if (request.get("stream_options") or {}).get("include_usage"):
                self._event({**head, "usage": usage}, [])
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, head: dict[str, Any], choices: list[dict[str, Any]]) -> None:
            data = {**head, "object": "chat.completion.chunk", "choices": choices}
            self.wfile.write(b"data: " + json.dumps(data).encode() + b"\n\n")
            self.wfile.flush()

        def _json(self, data: dict[str, Any], status: int = 200) -> None:
            self._send(json.dumps(data).encode(), "application/json", status)

        def _send(self, body: bytes, kind: str, status: int = 200) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return Handler

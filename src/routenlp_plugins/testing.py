"""Public test doubles: a tier that follows a script, and an OpenAI-compatible HTTP server that does.

A server that replays references stands in for a frontier model where none can be called; name it the *reference
frontier* wherever a number depends on it.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import log
from typing import Any

from .errors import TierError
from .types import Call, Completion

__all__ = ["FineTuningDouble", "ScriptedServer", "ScriptedTier", "count_tokens"]

Reply = Completion | str | Mapping[str, Any]
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
    pieces: int | None = None


class ScriptedServer:
    """An OpenAI-compatible chat-completion server on loopback; a context manager.

    Replies with what is scripted for the last user message, counts tokens with `count_tokens`, and streams when
    asked to. It fine-tunes too: a model whose job has ended says what its lessons say, and else what is scripted.

    Args:
        replies: last user message -> reply, or a function of the whole request. A reply is a text, or a completion
            whose `mean_logprob` every token gets; that of a text is log 0.99. It may also be the whole message of the
            assistant, such as one with ``tool_calls``. A message without reply is answered with status 404.
    """

    def __init__(self, replies: Replies) -> None:
        self.replies = replies
        self.requests: list[dict[str, Any]] = []
        self.tuning = FineTuningDouble()
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

    def break_off(self, after: int | None) -> None:
        """End every stream after this many pieces, in the middle of the connection; None lets them end as they do."""
        self._behaviour = replace(self._behaviour, pieces=after)

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

    def _reply(self, request: Mapping[str, Any]) -> _Said | None:
        reply: Reply | None = self.tuning.says(request)
        if reply is None and callable(self.replies):
            reply = self.replies(request)
        elif reply is None and not callable(self.replies):
            asked = (m["content"] for m in reversed(request["messages"]) if m.get("role") == "user")
            reply = self.replies.get(next(asked, ""))
        if reply is None:
            return None
        if isinstance(reply, str):
            reply = Completion(reply)
        return _Said(reply) if isinstance(reply, Completion) else _Said(Completion(reply.get("content") or ""), reply)


class _Said:
    """A reply as messages and chunks of the API."""

    def __init__(self, reply: Completion, message: Mapping[str, Any] | None = None) -> None:
        self.text = reply.text
        self.tokens = [_token(self.text[i : i + 4], reply.mean_logprob) for i in range(0, len(self.text), 4)]
        self.calls: list[dict[str, Any]] = [
            {"index": place, **call} for place, call in enumerate((message or {}).get("tool_calls") or ())
        ]
        self.ends = "tool_calls" if self.calls else "stop"
        self.counted = count_tokens(self.text + "".join(json.dumps(call["function"]) for call in self.calls))

    @property
    def message(self) -> dict[str, Any]:
        """As it is sent whole."""
        calls = [{name: value for name, value in call.items() if name != "index"} for call in self.calls]
        return {"role": "assistant", "content": self.text or None} | ({"tool_calls": calls} if calls else {})

    def pieces(self) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
        """Deltas, and of each its token: the words, then the calls, their arguments in two halves."""
        for token in self.tokens:
            yield {"role": "assistant", "content": token["token"]}, token
        for call in self.calls:
            arguments = call["function"]["arguments"]
            half = len(arguments) // 2
            begun = {**call, "function": {**call["function"], "arguments": arguments[:half]}}
            yield {"role": "assistant", "content": None, "tool_calls": [begun]}, None
            rest = {"index": call["index"], "function": {"arguments": arguments[half:]}}
            yield {"tool_calls": [rest]}, None


def _token(text: str, logprob: float | None) -> dict[str, Any]:
    return {"token": text, "logprob": log(0.99) if logprob is None else logprob, "bytes": None, "top_logprobs": []}


@dataclass(eq=False)
class FineTuningDouble:
    """Files and fine-tuning jobs of a scripted server.

    Attributes:
        looks: how often a job is looked at before it ends.
        failure: with which jobs end, instead of a model.
    """

    looks: int = 1
    failure: str | None = None
    files: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    jobs: dict[str, dict[str, Any]] = field(default_factory=dict)

    def upload(self, kind: str, body: bytes) -> dict[str, Any]:
        """Keep the lessons of a multipart request."""
        head = f"Content-Type: {kind}\r\n\r\n".encode()
        parts = message_from_bytes(head + body).walk()
        content = next(part.get_payload(decode=True) for part in parts if part.get_filename())
        name = f"file-{len(self.files)}"
        self.files[name] = [json.loads(line) for line in bytes(content).decode().splitlines()]
        told = {"object": "file", "bytes": len(content), "created_at": 0, "filename": "lessons.jsonl"}
        return {"id": name, **told, "purpose": "fine-tune", "status": "processed"}

    def create(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Begin a job."""
        name = f"ftjob-{len(self.jobs)}"
        facts = {"object": "fine_tuning.job", "created_at": 0, "organization_id": "scripted", "result_files": []}
        asked = {"model": request["model"], "training_file": request["training_file"], "seed": request.get("seed", 0)}
        given = {"hyperparameters": request.get("hyperparameters") or {}, "status": "running", "error": None}
        self.jobs[name] = {"id": name, **facts, **asked, **given, "fine_tuned_model": None, "trained_tokens": None}
        return self.jobs[name]

    def look(self, name: str) -> dict[str, Any] | None:
        """A job, or all of them; None if there is none of that name."""
        if not name:
            return {"object": "list", "data": list(self.jobs.values()), "has_more": False}
        job = self.jobs.get(name)
        if job is not None and job["status"] == "running":
            job["looks"] = job.get("looks", 0) + 1
            if job["looks"] > self.looks:
                self._end(job)
        return job

    def says(self, request: Mapping[str, Any]) -> str | None:
        """What a fine-tuned model was taught to say to this request."""
        made = next((job for job in self.jobs.values() if job["fine_tuned_model"] == request.get("model")), None)
        if made is None:
            return None
        asked = [dict(message) for message in request["messages"]]
        lessons = (lesson["messages"] for lesson in self.files[made["training_file"]])
        return next((said[-1]["content"] for said in lessons if said[:-1] == asked), None)

    def _end(self, job: dict[str, Any]) -> None:
        if self.failure is not None:
            job |= {"status": "failed", "error": {"code": "scripted", "message": self.failure, "param": None}}
            return
        tokens = sum(count_tokens(json.dumps(lesson)) for lesson in self.files[job["training_file"]])
        job |= {"status": "succeeded", "fine_tuned_model": f"ft:{job['model']}:{job['id']}", "trained_tokens": tokens}


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of ours."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _handler(server: ScriptedServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def log_message(self, *_: object) -> None: ...

        def do_GET(self) -> None:
            found = server.tuning.look(self.path.partition("?")[0].rpartition("/jobs")[2].strip("/"))
            self._json(found or {"error": {"message": "no such job"}}, 200 if found else 404)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path.endswith("/files"):
                self._json(server.tuning.upload(self.headers["Content-Type"], body))
                return
            request = json.loads(body)
            if self.path.endswith("/fine_tuning/jobs"):
                self._json(server.tuning.create(request))
                return
            behaviour = server._next(request)
            time.sleep(behaviour.delay)
            if behaviour.failures_left:
                self._json({"error": {"message": "scripted failure"}}, behaviour.status or 500)
            elif behaviour.nonsense:
                self._send(b"<html>not a completion</html>", "text/html")
            elif (reply := server._reply(request)) is None:
                self._json({"error": {"message": "nothing scripted for this message"}}, 404)
            else:
                self._complete(request, reply, behaviour)

        def _complete(self, request: dict[str, Any], said: _Said, behaviour: _Behaviour) -> None:
            prompt = sum(count_tokens(str(message.get("content") or "")) for message in request["messages"])
            usage = {
                "prompt_tokens": prompt,
                "completion_tokens": said.counted,
                "total_tokens": prompt + said.counted,
            }
            head = {"id": "chatcmpl-scripted", "created": int(time.time()), "model": request.get("model", "scripted")}
            if request.get("stream"):
                self._stream(head, request, said, usage, behaviour.pieces)
                return
            choice = {
                "index": 0,
                "message": said.message,
                "logprobs": {"content": said.tokens} if request.get("logprobs") else None,
                "finish_reason": said.ends,
            }
            self._json({**head, "object": "chat.completion", "choices": [choice], "usage": usage})

        def _stream(
            self, head: dict[str, Any], request: dict[str, Any], said: _Said, usage: dict[str, int], most: int | None
        ) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for sent, (delta, token) in enumerate(said.pieces()):
                if sent == most:
                    self.close_connection = True
                    return
                logprobs = {"content": [token]} if request.get("logprobs") and token else None
                self._event(head, [{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": None}])
            self._event(head, [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": said.ends}])
            if (request.get("stream_options") or {}).get("include_usage"):
                self._event({**head, "usage": usage}, [])
            self._chunk(b"data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")
            self.wfile.flush()

        def _event(self, head: dict[str, Any], choices: list[dict[str, Any]]) -> None:
            data = {**head, "object": "chat.completion.chunk", "choices": choices}
            self._chunk(b"data: " + json.dumps(data).encode() + b"\n\n")

        def _chunk(self, content: bytes) -> None:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(content), content))
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

"""A real server on loopback that speaks the chat-completions JSON."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from reknow.evaluation.matching import contains
from reknow.files.llm import LLM


class Server:
    """Answers with the given texts in turn, the last one for ever; an integer is an HTTP error, None is silence. A
    function makes one of these from what was asked. Tokens are counted as words."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []
        owner = self
        self.closing = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.asked.append((self.path, self.headers.get("Authorization"), body))
                answer = owner.answers.pop(0) if len(owner.answers) > 1 else owner.answers[0]
                content = body["messages"][-1]["content"]
                answer = answer(content) if callable(answer) else answer
                if answer is None:
                    owner.closing.wait(5)
                    return
                self.send_response(answer if isinstance(answer, int) else 200)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                reply: dict = {"choices": [{"index": 0, "message": {"role": "assistant", "content": answer}}]}
                asked, said = len(content.split()), len(str(answer).split())
                reply["usage"] = {"prompt_tokens": asked, "completion_tokens": said, "total_tokens": asked + said}
                raw = answer[4:] if isinstance(answer, str) and answer.startswith("raw:") else json.dumps(reply)
                self.wfile.write(raw.encode())

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def llm(self, **options) -> LLM:
        address = f"http://127.0.0.1:{self.http.server_port}/v1"
        return LLM("writer", address, **{"api_key": "key", "timeout": 30, "tries": 2, "wait": 0.01} | options)


def verdict(question: str) -> str:
    """What a judge says that looks whether the answer stands in what was written."""
    answer = question.partition("Expected answer: ")[2].partition("\nWhat")[0]
    text = question.partition("What the model wrote: ")[2].partition("\n\nReply")[0]
    return "A" if contains(text, [answer]) else " B."


@pytest.fixture
def serve():
    servers = []

    def start(*answers):
        servers.append(Server(*answers))
        return servers[-1]

    yield start
    for server in servers:
        server.closing.set()
        server.http.shutdown()
        server.http.server_close()

"""The routes: /v1/chat/completions, /v1/completions, /v1/models as OpenAI has them; /stacks to change them."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from reknow.errors import InputError, ModelError, PatchError, ReknowError
from reknow.patching.patches import Patch
from reknow.patching.stack import UnknownPatch
from reknow.serving.answers import Answer, Desk, Piece
from reknow.serving.requests import ChatRequest, CompletionRequest, Request, read_request
from reknow.serving.shapes import CHAT, TEXT, Shape, error_body
from reknow.serving.stacks import Stacks, UnknownStack

_log = logging.getLogger(__name__)

_MOST_BYTES = 2**30
"""The largest patch that is taken."""
_LOOK = 0.5
"""Seconds between two looks whether a client is there still."""
_STATUS: tuple[tuple[type[ReknowError], int], ...] = (
    (UnknownStack, 404),
    (UnknownPatch, 404),
    (PatchError, 409),
    (InputError, 400),
    (ModelError, 400),
    (ReknowError, 500),
)


def make_app(desk: Desk, stacks: Stacks, token: str | None, hosts: Sequence[str] | None) -> Starlette:
    """The application.

    Args:
        token: what clients must send as a bearer token; None: nothing.
        hosts: names by which the server may be called, so that no page of another site can; None: any.
    """
    routes = _Routes(desk, stacks)
    middleware = [] if hosts is None else [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))]
    return Starlette(
        routes=[
            Route("/health", lambda _request: JSONResponse({"status": "ok"})),
            Route("/v1/models", routes.models),
            Route("/v1/models/{name:path}", routes.model),
            Route("/v1/chat/completions", routes.chat, methods=["POST"]),
            Route("/v1/completions", routes.complete, methods=["POST"]),
            Route("/stacks", routes.list_stacks),
            Route("/stacks/{name}", routes.show_stack),
            Route("/stacks/{name}/patches", routes.add_patch, methods=["POST"]),
            Route("/stacks/{name}/patches/{patch}", routes.remove_patch, methods=["DELETE"]),
        ],
        middleware=[*middleware, *([] if token is None else [Middleware(_Bearer, token=token)])],
        exception_handlers={ReknowError: _refuse, HTTPException: _refuse_route, Exception: _fail},  # type: ignore[dict-item]
    )


class _Routes:
    def __init__(self, desk: Desk, stacks: Stacks):
        self._desk, self._stacks, self._begun = desk, stacks, int(time.time())

    async def models(self, _request: HTTPRequest) -> Response:
        """The base model and the stacks, each under the name by which it is asked."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._stacks.names]})

    async def model(self, request: HTTPRequest) -> Response:
        await run_in_threadpool(self._stacks.patches, name := request.path_params["name"])
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._begun, "owned_by": "reknow"}

    async def chat(self, request: HTTPRequest) -> Response:
        return await self._answer(request, ChatRequest, CHAT)

    async def complete(self, request: HTTPRequest) -> Response:
        return await self._answer(request, CompletionRequest, TEXT)

    async def _answer(self, request: HTTPRequest, kind: type[Request], shape: Shape) -> Response:
        _check_type(request, "application/json")
        asked: Request = read_request(kind, await request.body())
        patches = await run_in_threadpool(self._stacks.patches, asked.model)
        answer = Answer(asked)
        pieces = self._desk.pieces(answer, patches)
        head = shape.head(f"{shape.prefix}-{uuid.uuid4().hex}", int(time.time()), asked.model)
        if asked.stream:
            first = await anext(pieces, None)  # what is refused is refused before a stream begins
            return StreamingResponse(_stream(answer, first, pieces, shape, head), media_type="text/event-stream")
        texts = await _while_there(request, _collect(answer, pieces))
        return JSONResponse(shape.whole(head, texts, answer))

    async def list_stacks(self, _request: HTTPRequest) -> Response:
        names = [name for name in self._stacks.names if name != self._stacks.served_as]
        found = [await self._described(name) for name in names]
        return JSONResponse({"base": self._stacks.served_as, "stacks": found})

    async def show_stack(self, request: HTTPRequest) -> Response:
        return JSONResponse(await self._described(request.path_params["name"]))

    async def _described(self, name: str) -> dict[str, Any]:
        return _describe(name, await run_in_threadpool(self._stacks.patches, name))

    async def add_patch(self, request: HTTPRequest) -> Response:
        """Takes a patch file as the body, and puts it on top of the stack."""
        _check_type(request, "application/octet-stream")
        name = request.path_params["name"]
        with tempfile.TemporaryDirectory(prefix="reknow-") as folder:
            file = Path(folder) / "sent.patch"
            size = 0
            with file.open("wb") as opened:
                async for block in request.stream():
                    if (size := size + len(block)) > _MOST_BYTES:
                        raise InputError(
                            f"expected a patch of at most {_MOST_BYTES} bytes; got more: apply it by hand"
                        )
                    opened.write(block)
            patch = await run_in_threadpool(_load_sent, file)
            stack = await run_in_threadpool(self._stacks.add, name, patch, request.query_params.get("why", ""))
        _log.info("applied %s to %s", patch.label, name)
        return JSONResponse(_describe(name, stack), status_code=201)

    async def remove_patch(self, request: HTTPRequest) -> Response:
        name, patch = request.path_params["name"], request.path_params["patch"]
        why = request.query_params.get("why", "")
        stack = await run_in_threadpool(self._stacks.remove, name, patch, why)
        _log.info("reverted patch %s in %s", patch, name)
        return JSONResponse(_describe(name, stack))


def _load_sent(file: Path) -> Patch:
    """The patch that was sent; InputError where it is none."""
    try:
        return Patch.load(file)
    except PatchError as error:
        what = str(error).replace(str(file), "what was sent")
        raise InputError(f"{what}; send the bytes of a patch file as they are") from None


def _check_type(request: HTTPRequest, wanted: str) -> None:
    """A body of this type cannot be sent by a page of another site without being asked; HTTPException for others."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != wanted:
        raise HTTPException(
            415, f"expected a body of the type {wanted}; got {given or 'none'}: say so in Content-Type"
        )


def _describe(name: str, patches: Sequence[Patch]) -> dict[str, Any]:
    rows = [
        {
            "id": patch.id,
            "method": patch.method,
            "kind": patch.kind,
            "edits": [f"{edit.text} → {edit.target_new}" for edit in patch.edits],
        }
        for patch in patches
    ]
    return {"name": name, "patches": rows}


# --- answers -----------------------------------------------------------------------------------------------------


async def _collect(answer: Answer, pieces: AsyncIterator[Piece]) -> list[str]:
    """The whole texts, in the order of the prompts."""
    texts: dict[int, str] = {}
    async with aclosing(pieces):  # type: ignore[type-var]
        async for piece in pieces:
            texts[piece.number] = texts.get(piece.number, "") + piece.text
    return [texts.get(number, "") for number in range(len(answer.reasons))]


async def _while_there(request: HTTPRequest, work: Any) -> Any:
    """What the work gives, which ends if the client leaves."""
    task = asyncio.ensure_future(work)
    try:
        while not (await asyncio.wait({task}, timeout=_LOOK))[0]:
            if await request.is_disconnected():
                raise HTTPException(499, "the client has left")
        return task.result()
    finally:
        task.cancel()


async def _stream(
    answer: Answer, first: Piece | None, pieces: AsyncIterator[Piece], shape: Shape, head: dict[str, Any]
) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    try:
        async with aclosing(pieces):  # type: ignore[type-var]
            for number in range(len(answer.tokens)):
                if opening := shape.opening(head, number):
                    yield _event(opening)
            if first is not None:
                yield _event(shape.piece(head, first))
            async for piece in pieces:
                yield _event(shape.piece(head, piece))
        for number, reason in enumerate(answer.reasons):
            yield _event(shape.end(head, number, reason))
        if answer.request.stream_options is not None and answer.request.stream_options.include_usage:
            yield _event({**head, "object": shape.chunk, "choices": [], "usage": shape.usage(answer)})
    except ReknowError as error:  # the status is sent already
        yield _event(error_body(str(error), 500))
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


# --- refusals ----------------------------------------------------------------------------------------------------


async def _refuse(_request: HTTPRequest, error: Exception) -> Response:
    status = next(status for kind, status in _STATUS if isinstance(error, kind))
    return JSONResponse(error_body(str(error), status), status_code=status)


async def _refuse_route(_request: HTTPRequest, error: HTTPException) -> Response:
    return JSONResponse(error_body(error.detail, error.status_code), error.status_code, headers=error.headers)


async def _fail(_request: HTTPRequest, error: Exception) -> Response:
    _log.error("%s: %s", type(error).__name__, error, exc_info=error)
    said = f"expected no failure here; got {type(error).__name__}: the server's log says where, report it"
    return JSONResponse(error_body(said, 500), status_code=500)


class _Bearer:
    """Lets through only those who know the token; whether the server lives, anybody may ask."""

    def __init__(self, app: ASGIApp, token: str):
        self._app, self._wanted = app, f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._wanted):
                got = "another one" if given else "none"
                said = f"expected the server's bearer token; got {got}: send it as the API key"
                refusal = JSONResponse(error_body(said, 401), 401, headers={"WWW-Authenticate": "Bearer"})
                return await refusal(scope, receive, send)
        await self._app(scope, receive, send)

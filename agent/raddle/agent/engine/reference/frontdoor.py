"""The reference front door: an OpenAI-compatible HTTP API over one job's ranks.

A process of its own: `python -m raddle.agent.engine.reference.frontdoor`. It owns each request
until its last token left, through any change of ranks.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from raddle import models
from raddle.agent.engine.reference.routing import Routing
from raddle.agent.engine.reference.sequences import Sequences, SequenceState
from raddle.agent.engine.reference.shape import Shape, parse_shape
from raddle.model.errors import PermanentError, RaddleError, Reason, TemporaryError
from raddle.telemetry.addresses import split_address
from raddle.telemetry.logging import configure_logging
from raddle.telemetry.settings import load_settings, require, setting
from raddle.telemetry.tls import (
    FRONT_DOOR,
    is_loopback,
    renew_for_each_connection,
    tls_files,
)

BODY_BYTES_MAX = 1_000_000
SEQUENCES_MAX = 10_000
EXIT_REFUSED = 2
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of a front door."""

    schedulers: list[str] = setting([], "addresses of the schedulers, comma-separated")
    job: str = setting("", "namespace/name of the job to serve")
    name: str = setting("", "our name if we serve some namespaces alone: we are frontdoor/<name>")
    model: str = setting("raddle-demo", "model that the job serves: built-in, or a config.json")
    listen: str = setting("127.0.0.1:7480", "address for HTTP")
    request_timeout_s: float = setting(120.0, "longest time of one request")
    log_json: bool = setting(False, "JSON log lines even on a terminal")
    tls_ca: str = setting("", "CA of all members (PEM)")
    tls_certificate: str = setting("", "our certificate (PEM)")
    tls_key: str = setting("", "our key (PEM)")
    allow_plain_http: bool = setting(
        False, "serve HTTP without TLS off loopback: only where the network is trusted"
    )
    http_certificate: str = setting("", "certificate to serve HTTPS with (PEM)")
    http_key: str = setting("", "its key (PEM)")


class FrontDoor:
    """Requests in, tokens out."""

    def __init__(
        self, routing: Routing, shape: Shape, model: str, request_timeout_s: float
    ) -> None:
        self._routing = routing
        self._shape = shape
        self._model = model
        self._timeout_s = request_timeout_s
        self.sequences = Sequences(routing)
        self._finished = 0
        self._failed = 0

    def routes(self) -> list[Route]:
        return [
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.list_models),
            Route("/health", self.health),
            Route("/ready", self.ready),
            Route("/live", self.live),
            Route("/metrics", self.metrics),
        ]

    async def list_models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": self._model, "object": "model"}]})

    async def health(self, _request: Request) -> Response:
        live = self._routing.is_live
        return JSONResponse({"live": live}, status_code=200 if live else 503)

    async def ready(self, _request: Request) -> Response:
        """Whoever balances over front doors may send requests here: some are held for a while."""
        if self._routing.takes_requests:
            return PlainTextResponse("ok\n")
        return PlainTextResponse("the job is not live yet, or it has ended\n", status_code=503)

    async def live(self, _request: Request) -> Response:
        """The process works, whatever its job does."""
        return PlainTextResponse("ok\n")

    async def metrics(self, _request: Request) -> Response:
        s = self.sequences
        rows = {
            "raddle_frontdoor_requests_finished_total": self._finished,
            "raddle_frontdoor_requests_failed_total": self._failed,
            "raddle_frontdoor_sequences_running": len(s.running),
            "raddle_frontdoor_sequences_moved_total": s.moved,
            "raddle_frontdoor_kv_tokens_restored_total": s.kv_tokens_restored,
            "raddle_frontdoor_kv_tokens_recomputed_total": s.kv_tokens_recomputed,
        }
        return PlainTextResponse("".join(f"{name} {value}\n" for name, value in rows.items()))

    async def complete(self, request: Request) -> Response:
        try:
            body = await _body(request)
            state = self._state(body)
        except PermanentError as error:
            return _error(400, error)
        if body.get("stream"):
            return StreamingResponse(self._events(state), media_type="text/event-stream")
        try:
            tokens = [token async for token in self._tokens(state)]
        except RaddleError as error:
            return _error(504 if isinstance(error, TemporaryError) else 400, error)
        return JSONResponse(self._answer(state, tokens, "length"))

    def _state(self, body: dict[str, Any]) -> SequenceState:
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            prompt = list(prompt.encode())
        if not isinstance(prompt, list) or not prompt:
            raise _invalid("prompt must be a text or a list of token numbers")
        if not all(isinstance(t, int) and 0 <= t < self._shape.vocabulary for t in prompt):
            raise _invalid(f"prompt tokens must be whole numbers below {self._shape.vocabulary}")
        max_tokens = body.get("max_tokens", 16)
        if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
            raise _invalid("max_tokens must be a whole number above 0")
        if len(prompt) + max_tokens > self._shape.context_max:
            raise _invalid(f"prompt and completion are over {self._shape.context_max} tokens")
        if len(self.sequences.running) >= SEQUENCES_MAX:
            raise PermanentError(
                Reason.LIMIT_EXCEEDED, f"{SEQUENCES_MAX} requests run already; try later."
            )
        return SequenceState(
            sequence_id=f"s-{secrets.token_hex(6)}",
            prompt=prompt,
            max_tokens=max_tokens,
            deadline_s=time.monotonic() + self._timeout_s,
        )

    async def _tokens(self, state: SequenceState) -> AsyncIterator[int]:
        self._routing.sequence_began(state)
        try:
            async for token in self.sequences.run(state):
                yield token
        except RaddleError:
            self._failed += 1
            raise
        self._finished += 1

    async def _events(self, state: SequenceState) -> AsyncIterator[str]:
        """Server-sent events, one a token; an error is an event too, since the head has left."""
        try:
            async for token in self._tokens(state):
                yield f"data: {json.dumps(self._answer(state, [token], None))}\n\n"
        except RaddleError as error:
            yield f"data: {json.dumps({'error': _details(error)})}\n\n"
            return
        yield f"data: {json.dumps(self._answer(state, [], 'length'))}\n\n"
        yield "data: [DONE]\n\n"

    def _answer(
        self, state: SequenceState, tokens: list[int], finish_reason: str | None
    ) -> dict[str, Any]:
        text = bytes(token % 256 for token in tokens).decode("latin-1")
        choice = {"index": 0, "text": text, "tokens": tokens, "finish_reason": finish_reason}
        return {
            "id": state.sequence_id,
            "object": "text_completion",
            "model": self._model,
            "choices": [choice],
            "served_by": self._routing.served_by(state.sequence_id),
            "usage": {"prompt_tokens": len(state.prompt), "completion_tokens": len(state.sent)},
        }


def _invalid(message: str) -> PermanentError:
    return PermanentError(Reason.INVALID_ARGUMENT, f"{message}.")


def _details(error: RaddleError) -> dict[str, str]:
    return {"type": str(error.reason), "message": error.message}


def _error(status: int, error: RaddleError) -> JSONResponse:
    return JSONResponse({"error": _details(error)}, status_code=status)


async def _body(request: Request) -> dict[str, Any]:
    size = 0
    parts = []
    async for part in request.stream():
        size += len(part)
        if size > BODY_BYTES_MAX:
            raise PermanentError(Reason.LIMIT_EXCEEDED, f"the body is over {BODY_BYTES_MAX} bytes.")
        parts.append(part)
    try:
        body = json.loads(b"".join(parts))
    except ValueError as error:
        raise _invalid(f"the body is no JSON: {error}") from error
    if not isinstance(body, dict):
        raise _invalid("the body must be a JSON object")
    return body


def _config_text(model: str) -> str:
    """The config.json of a built-in model or of a file.

    Raises:
        PermanentError: NOT_FOUND.
    """
    if model in models.names():
        return models.config_text(model)
    try:
        return Path(model).read_text()
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(models.names())
        raise PermanentError(
            Reason.NOT_FOUND, f"{model} is neither a built-in model ({known}) nor a readable file."
        ) from error


async def serve(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT."""
    tls = tls_files(settings.tls_ca, settings.tls_certificate, settings.tls_key)
    is_safe = settings.http_certificate or settings.allow_plain_http or is_loopback(settings.listen)
    if not is_safe:
        raise PermanentError(
            Reason.PERMISSION_DENIED,
            f"{settings.listen} is not loopback: give --http-certificate and --http-key, or"
            " --allow-plain-http where the network is trusted.",
        )
    shape = parse_shape(_config_text(settings.model))
    namespace, _, name = settings.job.rpartition("/")
    routing = Routing(
        f"{FRONT_DOOR}/{settings.name}" if settings.name else FRONT_DOOR,
        settings.schedulers,
        namespace or "default",
        name,
        shape.digest,
        tls,
    )
    door = FrontDoor(routing, shape, settings.model, settings.request_timeout_s)
    host, port = split_address(settings.listen)
    config = uvicorn.Config(
        Starlette(routes=door.routes()),
        host=host,
        port=port,
        log_config=None,
        lifespan="off",
        ssl_certfile=settings.http_certificate or None,
        ssl_keyfile=settings.http_key or None,
    )
    config.load()
    if config.ssl is not None:
        files = (Path(settings.http_certificate), Path(settings.http_key))
        renew_for_each_connection(config.ssl, *files)
    server = uvicorn.Server(config)
    following = asyncio.create_task(routing.run())
    loop = asyncio.get_running_loop()
    serving = asyncio.create_task(server._serve())  # noqa: SLF001 - serve() takes the signals
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: setattr(server, "should_exit", True))
    try:
        await asyncio.wait({following, serving}, return_when=asyncio.FIRST_COMPLETED)
        if following.done():
            following.result()
    finally:
        server.should_exit = True
        following.cancel()
        await asyncio.gather(following, serving, return_exceptions=True)
        await routing.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point."""
    try:
        settings, _ = load_settings(
            Settings, "raddle-frontdoor", "The front door of the reference engine.", argv
        )
        require([("--schedulers", settings.schedulers), ("--job", settings.job)])
        configure_logging("frontdoor", json_lines=settings.log_json or None)
        asyncio.run(serve(settings))
    except RaddleError as error:
        sys.stderr.write(f"raddle-frontdoor: {error}\n")
        sys.exit(EXIT_REFUSED)


if __name__ == "__main__":
    main()

"""The routes."""

from __future__ import annotations

import time

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from qcompile.serve.answering import answer_chat, answer_text
from qcompile.serve.api_error import ApiError, json_response
from qcompile.serve.gate import Gate
from qcompile.serve.generation import Service

_SPARE_REQUESTS = 256  # beyond what the queue takes: refusals, bodies that are still coming, /metrics
_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(service: Service) -> FastAPI:
    """Return the application that answers for a service."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    max_open = service.admission.capacity + _SPARE_REQUESTS
    app.add_middleware(Gate, settings=service.settings, metrics=service.metrics, max_open=max_open)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _bug)
    _add_generation(app, service)
    _add_state(app, service)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer_chat(service, request)

    @app.post("/v1/completions")
    async def text(request: Request) -> Response:
        return await answer_text(service, request)


def _add_state(app: FastAPI, service: Service) -> None:
    name = service.settings.model_name
    model = {
        "id": name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "qcompile",
        "max_model_len": service.engine.max_model_len,
    }

    @app.get("/v1/models")
    async def models() -> Response:
        return json_response({"object": "list", "data": [model]})

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str) -> Response:
        if model_id != name:
            raise ApiError(
                404, f"the model '{model_id[:60]}' does not exist; this server has '{name}'", "model_not_found"
            )
        return json_response(model)

    @app.get("/health")
    async def health() -> Response:
        if service.admission.is_closed or not service.thread.is_alive:
            return json_response({"status": "shutting down"}, 503)
        return json_response({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)


async def _api_error(request: Request, error: Exception) -> Response:
    del request
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:60]}: {error.detail}"
    return ApiError(error.status_code, message, _CODES.get(error.status_code)).response()


async def _gone(request: Request, error: Exception) -> Response:
    del request, error
    return Response(status_code=499)  # nobody reads it; it is counted


async def _bug(request: Request, error: Exception) -> Response:
    """Our own bug: uvicorn logs the traceback, the client gets no inside view."""
    del request, error
    return ApiError(500, "internal error; the server's log says more").response()

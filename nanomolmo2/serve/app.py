"""The app: routes, the page, and what stands in front of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles

from nanomolmo2.serve import errors, finding, openai, plain, responses
from nanomolmo2.serve.answering import Server, server_of
from nanomolmo2.serve.documents import describe, documented
from nanomolmo2.serve.metrics import CONTENT_TYPE
from nanomolmo2.serve.replies import Health
from nanomolmo2.serve.security import Guard
from nanomolmo2.serve.settings import ServeSettings
from nanomolmo2.serve.store import ModelStore

PAGE = Path(__file__).parent / "page"

router = APIRouter()


def make_app(models: ModelStore, settings: ServeSettings) -> FastAPI:
    """A server of models; ``app.state.server`` holds its state, such as ``admission.drain()``."""
    server = Server(models, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        warming = asyncio.ensure_future(server.warmed(None))
        yield
        warming.cancel()

    app = FastAPI(
        title="NanoMolmo2",
        docs_url=None,  # they come from a network of others
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.server = server
    for part in (router, openai.router, responses.router, plain.router, finding.router):
        app.include_router(part)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    errors.install(app)
    app.add_middleware(Guard, settings=settings, admission=server.admission, metrics=server.metrics)
    describe(app, has_keys=bool(settings.api_keys))
    return app


@router.get("/", include_in_schema=False)
@router.head("/", include_in_schema=False)
async def page() -> Response:
    """The page for people."""
    return FileResponse(PAGE / "index.html", media_type="text/html")


@router.get("/health", **documented(None, Health))
@router.head("/health", include_in_schema=False)
async def health(request: Request) -> Response:
    """Whether requests are taken: 200, or 503 once the server ends."""
    server = server_of(request)
    status = "draining" if server.admission.draining else "ok"
    found = {"status": status, "models": server.models.names()}
    return JSONResponse(found, 200 if status == "ok" else 503)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Numbers of the server, as Prometheus reads them."""
    server = server_of(request)
    text = server.metrics.render(server.models, server.admission)
    return PlainTextResponse(text, media_type=CONTENT_TYPE)

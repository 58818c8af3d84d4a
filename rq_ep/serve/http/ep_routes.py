"""Routes of expert parallelism: placement, load of experts and ranks, members, recordings, and the dashboard."""

from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse

from rq_ep.serve.http.openai.api_errors import ApiError
from rq_ep.serve.http.openai.bodies.ep_bodies import RanksBody, RebalanceBody
from rq_ep.serve.http.openai.openapi import body_schema
from rq_ep.serve.http.openai.request_body import BodyReader
from rq_ep.serve.http.service import Service


def add_ep_routes(app: FastAPI, service: Service, bodies: BodyReader) -> None:
    """Add the routes of a service.

    Args:
        app: that they are added to.
        service: answers them.
        bodies: reads the bodies of requests.
    """
    page = (files("rq_ep.serve.http") / "dashboard.html").read_text()

    @app.get("/v1/ep/placement")
    async def placement() -> dict[str, Any]:
        """The placement that is served, as `placement.json` holds it."""
        document = await service.placement.document()
        if document is None:
            raise ApiError(503, "not serving: the model is loading")
        return document

    @app.get("/v1/ep/load")
    async def load() -> dict[str, Any]:
        """Routed pairs of ranks and experts, since the start and lately; speed and latency over the last minutes."""
        load = service.load_view.view()
        return {"model": service.model_name, **load, "history": service.history.view()}

    @app.post("/v1/ep/record/start")
    async def start() -> dict[str, Any]:
        """Record the router's choice for every token, on every rank, until the recording is stopped.

        At most `max_tokens` (--record-max-tokens) are kept, the first ones. A recording that is under way when the
        server ends is lost.
        """
        service.check_available()
        return {"recording": True, **service.recording.start()}

    @app.post("/v1/ep/record/stop")
    async def stop() -> dict[str, Any]:
        """End the recording and name the trace on the server's disk, for `trace:FILE` and `rq-ep simulate --trace`.

        `is_full`: there was more to record than --record-max-tokens.
        """
        return {"recording": False, **await service.recording.stop()}

    @app.get("/v1/ep/rebalance")
    async def rebalance() -> dict[str, Any]:
        """The state of rebalancing, its last decision with the reason, bytes done and left, seconds since progress."""
        return {"model": service.model_name, **service.rebalancing.view()}

    @app.post("/v1/ep/rebalance", openapi_extra=body_schema(RebalanceBody))
    async def command(http: Request) -> dict[str, Any]:
        """Decide now instead of when it is due, give up what is under way, or say what a decision would move."""
        service.check_available()
        body = await bodies.read(http, RebalanceBody)
        return await service.rebalancing.command(body.action)

    @app.get("/v1/ep/ranks")
    async def ranks() -> dict[str, Any]:
        """State, reason, generation, times and numbers of each rank, and what has happened to them lately."""
        return {"model": service.model_name, **service.members.view()}

    @app.post("/v1/ep/ranks", openapi_extra=body_schema(RanksBody))
    async def change(http: Request) -> dict[str, Any]:
        """Have ranks leave, once their requests have finished or have gone to other ranks, or have them come back.

        The answer has the states that ranks are in then. Ranks stay whose experts the others cannot hold: status 409.
        """
        service.check_available()
        body = await bodies.read(http, RanksBody)
        return {"model": service.model_name, **await service.members.change(body)}

    @app.get("/dashboard", include_in_schema=False)
    async def dashboard() -> HTMLResponse:
        return HTMLResponse(page)

"""The ASGI application: routes and lifespan. No route forwards without metering; any other path is 404."""

from __future__ import annotations

import asyncio
import hmac
import logging
import sys
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import msgspec

from gateway import idempotency, relay, tokenization
from gateway.admission import ADMIT, CANCEL, Admission
from gateway.authentication import Authenticator, check_scope
from gateway.background import keep_running
from gateway.calls import Call, read_labels
from gateway.contract.catalog_snapshot import PriceRecord, ServedModelRecord, UpstreamRecord
from gateway.counting import count_live_streams
from gateway.endpoints.dialect import Dialect
from gateway.endpoints.translated_exchange import DIALECTS, TranslatedExchange, send_error, translate_request
from gateway.errors import (
    SERVER,
    CannotStartError,
    GatewayError,
    RedisUnavailableError,
    SpoolFullError,
    build_metering_unavailable,
)
from gateway.event_log import EventLog
from gateway.exchange import Exchange
from gateway.gauges import add_gauges
from gateway.providers.base import CallRequest
from gateway.readiness import RecordingProbe
from gateway.receipts import Receipts
from gateway.redis_cluster import connect_redis
from gateway.routing import CircuitBreakers
from gateway.settings import Settings
from gateway.settle_commands import PLACE_HOLD, SETTLE
from gateway.snapshot_reader import Caller, Catalog, Offer, SnapshotReader
from gateway.spool import open_own_spool
from gateway.sweeper import LIST_EXPIRED, RENEW, Sweeper
from gateway.telemetry import Telemetry
from gateway.tokenizer import TokenizerError
from gateway.tokenizer_client import start_tokenizer, stop_tokenizer
from gateway.upstream import UpstreamPool
from gateway.usage_report import build_usage_report

log = logging.getLogger("gateway")

# Whether a key may call is looked up when the head of its request is there, and again when it is served later than so.
AUTHENTICATED_S: Final = 0.1
JSON_TYPE = (b"content-type", b"application/json")
# Of the tenant's headers only these go on to a provider: never its key, its cookies or its SDK's marks.
FORWARDED_HEADERS: Final = (b"traceparent", b"tracestate")
ENDPOINTS = {
    "/v1/chat/completions": "chat.completions",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
}
DIALECT_PATHS = {f"/v1/{name}": dialect for name, dialect in DIALECTS.items()}
MODELS_PATH = "/v1/models"
USAGE_PATH = "/v1/usage"
TOKENIZE_PATH = "/v1/tokenize"
COUNT_TOKENS_PATH = "/v1/messages/count_tokens"
# A key that is restricted to some endpoints reads receipts only where this is one of them, as at the web process.
BILLING_ENDPOINT = "billing"


@dataclass(frozen=True, slots=True)
class Route:
    """What serves a path. `is_public`: without an API key. `endpoint` is set where the route forwards a call, and
    `dialect` where it does not speak of chat completions itself."""

    method: str
    serve: Callable[[Exchange], Coroutine[Any, Any, None]]
    endpoint: str = ""
    dialect: Dialect | None = None
    is_public: bool = False


class GatewayApp:
    """One gateway process: its connections, its in-flight calls and its routes."""

    def __init__(self, settings: Settings, *, worker: str = "0") -> None:
        self._settings = settings
        self._worker = worker
        self._authenticator = Authenticator(settings.api_key_pepper)
        self._background: list[asyncio.Task[None]] = []
        self._routes = self._build_routes()
        self._tokenization = tokenization.Tokenization()
        # What lies below a path: one page for each name. Below a base URL with /v1 or without it.
        self._prefix_routes = {
            f"{MODELS_PATH}/": Route("GET", self._serve_model),
            f"{USAGE_PATH}/": Route("GET", self._serve_receipt),
        }

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Start and stop, as uvicorn asks by ASGI's lifespan protocol; requests come to `serve`."""
        if scope["type"] == "lifespan":
            await self._run_lifespan(receive, send)

    # http_server.Application

    def check_head(self, exchange: Exchange) -> None:
        """Find the route and the caller of a request; raises GatewayError. No stranger's body is waited for."""
        route = self._find_route(exchange.path)
        if route is None:
            raise _build_unknown_url(exchange)
        if exchange.method != route.method:
            raise _build_method_not_allowed(exchange, route.method)
        exchange.route = route
        if not route.is_public:
            self._authenticate(exchange)

    def _authenticate(self, exchange: Exchange) -> None:
        catalog = self._snapshots.get_usable()
        if catalog is None:
            raise _build_catalog_unavailable()
        exchange.catalog = catalog
        authorization = exchange.headers.get(b"authorization")
        if authorization is None and b"x-api-key" in exchange.headers:
            # Anthropic's header for the same key. From here on it is as if the other one had come.
            authorization = b"Bearer " + exchange.headers[b"x-api-key"]
            exchange.headers = {**exchange.headers, b"authorization": authorization}
        now_ms = time.time_ns() // 1_000_000
        exchange.caller = self._authenticator.authenticate(authorization, catalog, now_ms=now_ms)

    def _is_just_authenticated(self, exchange: Exchange) -> bool:
        is_recent = time.monotonic() - exchange.started_at < AUTHENTICATED_S
        return is_recent and exchange.catalog is self._snapshots.catalog

    async def serve(self, exchange: Exchange) -> None:
        """Answer one exchange."""
        if exchange.refusal is not None:
            self._refuse(exchange, exchange.refusal)
            return
        try:
            if not exchange.route.is_public and not self._is_just_authenticated(exchange):
                # Its body came slowly, or it has waited for its turn: the key may have ended meanwhile.
                self._authenticate(exchange)
            await exchange.route.serve(exchange)
        except GatewayError as error:
            self._refuse(exchange, error)
        except Exception:
            log.exception("request %s failed inside the gateway", exchange.call_id)
            if exchange.has_started:
                exchange.cut()
            else:
                send_error(exchange, GatewayError(500, "internal_error", "The gateway failed.", type=SERVER))

    def _refuse(self, exchange: Exchange, error: GatewayError) -> None:
        self._telemetry.error_answers.add(1, (str(error.status), error.code))
        send_error(exchange, error)

    # Life

    async def startup(self) -> None:
        """Connect, read the catalog, open the spool; raises CannotStartError."""
        settings = self._settings
        timeout_s = settings.redis_timeout_ms / 1000
        scripts = (ADMIT, CANCEL, SETTLE, PLACE_HOLD, RENEW, LIST_EXPIRED, idempotency.IDEMPOTENCY)
        self._telemetry = Telemetry(self._worker, settings.metrics_dir)
        self._redis = connect_redis(
            settings.redis_url, timeout_s=timeout_s, scripts=scripts, replicas_min=settings.redis_replicas_min
        )
        producer = f"gw-{uuid.uuid4().hex}"
        try:
            spool = open_own_spool(settings.spool_dir, producer, bytes_max=settings.spool_bytes_max)
        except SpoolFullError as error:
            raise CannotStartError(f"{error}: free disk space in {settings.spool_dir}") from error
        self._event_log = EventLog(
            self._redis,
            spool,
            self._telemetry,
            producer=producer,
            settle_wait_s=settings.settle_wait_ms / 1000,
        )
        self._parts = relay.RelayParts(
            admission=Admission(self._redis, self._event_log, settings),
            event_log=self._event_log,
            pool=UpstreamPool(),
            breakers=CircuitBreakers(),
            telemetry=self._telemetry,
            settings=settings,
        )
        self._idempotency = idempotency.Idempotency(self._redis, settings, self._telemetry)
        self._receipts = Receipts(self._redis, self._parts.pool, web_url=settings.web_url)
        self._snapshots = SnapshotReader(
            self._redis,
            connect_redis(settings.redis_url, timeout_s=timeout_s),
            age_max_s=settings.snapshot_age_max_s,
            sandbox_url=settings.sandbox_url,
        )
        self._probe = RecordingProbe(self._redis, get_catalog=lambda: self._snapshots.catalog)
        self._sweeper = Sweeper(
            redis=self._redis,
            event_log=self._event_log,
            snapshots=self._snapshots,
            settings=settings,
            telemetry=self._telemetry,
            in_flight=self._parts.in_flight,
        )
        self._redis.start()
        if not await self._redis.wait_up(settings.redis_start_wait_s):
            raise CannotStartError(
                "the Redis-protocol server cannot be reached, so usage could not be recorded: "
                "check TOLLBOOK_REDIS_URL, or start the server"
            )
        await self._snapshots.start()
        await self._probe.start()
        await self._start_tokenizer()
        self._sweeper.start()
        add_gauges(self._parts, redis=self._redis, probe=self._probe, snapshots=self._snapshots)
        self._start_background()
        log.info("gateway process %s records as %s", self._worker, producer)

    async def _start_tokenizer(self) -> None:
        """Have the ranks loaded before the first call needs them: that takes most of a second."""
        try:
            await start_tokenizer(self._telemetry.tokenizer_restarts.add)
        except TokenizerError as error:
            log.error("calls without believable usage cannot be counted: %s", error)

    def _start_background(self) -> None:
        interval_s = self._settings.lease_s / 3
        count = partial(count_live_streams, self._parts.in_flight, interval_s=interval_s)
        loop = asyncio.get_running_loop()
        self._background = [loop.create_task(keep_running(work)) for work in (self._publish_metrics, count)]

    async def shutdown(self) -> None:
        """Record what is still running, within a bound, and close."""
        deadline = time.monotonic() + relay.STOP_WAIT_S
        while self._parts.in_flight and time.monotonic() < deadline:  # noqa: ASYNC110 (only once, at the end)
            await asyncio.sleep(0.01)
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await stop_tokenizer()
        await self._probe.close()
        await self._sweeper.close()
        await self._event_log.close()
        await self._snapshots.close()
        await self._parts.pool.close()
        await self._redis.close()
        self._telemetry.publish()

    async def _run_lifespan(self, receive: Any, send: Any) -> None:
        await receive()
        has_started = True
        try:
            await self.startup()
        except CannotStartError as error:
            sys.stderr.write(f"The gateway cannot start:\n{error}\n")
            has_started = False
        if not has_started:
            await send({"type": "lifespan.startup.failed", "message": ""})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.shutdown()
        await send({"type": "lifespan.shutdown.complete"})

    async def _publish_metrics(self) -> None:
        while True:
            self._telemetry.publish()
            await asyncio.sleep(1.0)

    # Routes

    def _build_routes(self) -> dict[str, Route]:
        routes = {
            MODELS_PATH: Route("GET", self._serve_models),
            USAGE_PATH: Route("GET", self._serve_usage),
            "/healthz": Route("GET", self._serve_health, is_public=True),
            "/readyz": Route("GET", self._serve_readiness, is_public=True),
            "/metrics": Route("GET", self._serve_metrics, is_public=True),
        }
        routes[TOKENIZE_PATH] = Route("POST", self._serve_tokenize)
        routes[COUNT_TOKENS_PATH] = Route("POST", self._serve_count_tokens)
        routes |= {path: Route("POST", self._serve_call, endpoint=endpoint) for path, endpoint in ENDPOINTS.items()}
        routes |= {
            path: Route("POST", self._serve_call, endpoint=dialect.endpoint, dialect=dialect)
            for path, dialect in DIALECT_PATHS.items()
        }
        # The base URL of a client may end in /v1 or not.
        return routes | {path.removeprefix("/v1"): route for path, route in routes.items()}

    def _find_route(self, path: str) -> Route | None:
        route = self._routes.get(path)
        if route is not None:
            return route
        path = _add_version(path)
        return next((route for prefix, route in self._prefix_routes.items() if path.startswith(prefix)), None)

    async def _serve_call(self, exchange: Exchange) -> None:
        catalog, caller, endpoint = exchange.catalog, exchange.caller, exchange.route.endpoint
        if exchange.headers.get(b"x-stainless-retry-count", b"0") != b"0":
            self._telemetry.client_retries.add()
        request = _parse_request(exchange, endpoint)
        offer, price = _find_offer(request.json, caller, catalog, endpoint=endpoint)
        model_name = offer.model.name
        if not offer.upstreams:
            raise GatewayError(503, "no_upstream", f"No provider serves '{model_name}' now.", type=SERVER)
        dialect: Dialect | None = exchange.route.dialect
        asked = request.json
        if dialect is not None:
            request = translate_request(request, dialect)
        request_id = exchange.headers.get(b"x-request-id", b"") if self._parts.settings.label_request_id else b""
        call = Call(
            call_id=exchange.call_id,
            occurred_at_us=exchange.occurred_at_us,
            started_at=exchange.started_at,
            caller=caller,
            model=offer.model,
            price=price,
            endpoint=endpoint,
            request=request,
            labels=read_labels(request.json, client_request_id=request_id),
        )

        if idempotency.HEADER in exchange.headers:
            run = partial(self._run_call, call, offer.upstreams, dialect, asked)
            await self._idempotency.serve(exchange, call, run)
        else:
            await self._run_call(call, offer.upstreams, dialect, asked, exchange)

    def _run_call(
        self,
        call: Call,
        upstreams: tuple[UpstreamRecord, ...],
        dialect: Dialect | None,
        asked: dict[str, Any],
        outlet: Exchange,
    ) -> Coroutine[Any, Any, None]:
        """Return the run of a call that answers through `outlet`; `asked` is the body as its dialect has it."""
        if dialect is not None:
            outlet = TranslatedExchange(outlet, call, dialect=dialect, asked=asked)
        return relay.Relay(self._parts, outlet, call).run(upstreams)

    async def _serve_models(self, exchange: Exchange) -> None:
        data = [_describe_model(offer.model) for offer in exchange.catalog.list_offers(exchange.caller)]
        await exchange.send_whole(200, [JSON_TYPE], msgspec.json.encode({"object": "list", "data": data}))

    async def _serve_model(self, exchange: Exchange) -> None:
        name = _add_version(exchange.path)[len(MODELS_PATH) + 1 :]
        for offer in exchange.catalog.list_offers(exchange.caller):
            if offer.model.name == name:
                await exchange.send_whole(200, [JSON_TYPE], msgspec.json.encode(_describe_model(offer.model)))
                return
        raise _build_model_not_found(name)

    async def _serve_usage(self, exchange: Exchange) -> None:
        try:
            report = await build_usage_report(self._redis, exchange.caller, exchange.catalog)
        except RedisUnavailableError:
            raise build_metering_unavailable() from None
        await exchange.send_whole(200, [JSON_TYPE], msgspec.json.encode(report))

    async def _serve_receipt(self, exchange: Exchange) -> None:
        check_scope(exchange.caller, endpoint=BILLING_ENDPOINT)
        receipt = await self._receipts.get(
            _add_version(exchange.path)[len(USAGE_PATH) + 1 :],
            caller=exchange.caller,
            catalog=exchange.catalog,
            authorization=exchange.headers[b"authorization"],
            now_ms=exchange.occurred_at_us // 1000,
        )
        await exchange.send_whole(200, [JSON_TYPE], msgspec.json.encode(receipt))

    async def _serve_tokenize(self, exchange: Exchange) -> None:
        tokenized = await self._tokenize(exchange, endpoint="tokenize")
        await exchange.send_whole(200, [JSON_TYPE], msgspec.json.encode(tokenized))

    async def _serve_count_tokens(self, exchange: Exchange) -> None:
        """Answer what a message with this body would have as input; nothing is forwarded."""
        tokenized = await self._tokenize(exchange, endpoint="messages", dialect=DIALECTS["messages"])
        await exchange.send_whole(200, [JSON_TYPE], msgspec.json.encode({"input_tokens": tokenized.count}))

    async def _tokenize(
        self, exchange: Exchange, *, endpoint: str, dialect: Dialect | None = None
    ) -> tokenization.Tokenized:
        if len(exchange.body) > tokenization.BODY_BYTES_MAX:
            message = f"The request's body is larger than {tokenization.BODY_BYTES_MAX} bytes."
            raise GatewayError(413, "request_too_large", message)
        caller = exchange.caller
        body = _parse_body(exchange.body)
        offer, _price = _find_offer(body, caller, exchange.catalog, endpoint=endpoint)
        if dialect is not None:
            body = dialect.read_request({**body, "max_tokens": 1})
        return await self._tokenization.tokenize(body, offer.model, tenant_id=caller.tenant.tenant_id)

    async def _serve_health(self, exchange: Exchange) -> None:
        await exchange.send_whole(200, [JSON_TYPE], b'{"status":"ok"}')

    async def _serve_readiness(self, exchange: Exchange) -> None:
        """Not ready when recording would fail, or when there is no catalog."""
        has_room = self._event_log.room.has_room
        checks = {
            "catalog": self._snapshots.get_usable() is not None,
            "redis": self._redis.is_up and self._probe.can_write_redis,
            "spool": has_room,
        }
        is_spool_fresh = self._event_log.get_spool_age_s() <= self._settings.spool_age_max_s
        # One master of a cluster is enough: the tenants of the others are served nowhere else either.
        can_record = checks["redis"] or is_spool_fresh or self._redis.is_partly_up
        is_ready = checks["catalog"] and has_room and can_record
        body = msgspec.json.encode({"status": "ready" if is_ready else "not_ready", "checks": checks})
        await exchange.send_whole(200 if is_ready else 503, [JSON_TYPE], body)

    async def _serve_metrics(self, exchange: Exchange) -> None:
        """Answer whoever has Prometheus' token; there is no such page where none is set."""
        token = self._settings.metrics_token
        if not token:
            raise _build_unknown_url(exchange)
        if not hmac.compare_digest(exchange.headers.get(b"authorization", b""), b"Bearer " + token):
            raise GatewayError(401, "invalid_metrics_token", "This page needs the bearer token of its operator.")
        content_type = (b"content-type", b"text/plain; version=0.0.4; charset=utf-8")
        await exchange.send_whole(200, [content_type], self._telemetry.render_all())


def _build_unknown_url(exchange: Exchange) -> GatewayError:
    return GatewayError(404, "unknown_url", f"Unknown request URL: {exchange.method} {exchange.path}.")


def _add_version(path: str) -> str:
    """Return the path as it is below a base URL that ends in /v1."""
    return path if path.startswith("/v1/") else f"/v1{path}"


def _build_method_not_allowed(exchange: Exchange, method: str) -> GatewayError:
    message = f"Not allowed to {exchange.method} on {exchange.path}."
    return GatewayError(405, "method_not_allowed", message, headers=((b"allow", method.encode()),))


def _build_catalog_unavailable() -> GatewayError:
    message = "The gateway has no current catalog."
    return GatewayError(503, "catalog_unavailable", message, type=SERVER, headers=((b"retry-after", b"1"),))


def _find_offer(body: dict[str, Any], caller: Caller, catalog: Catalog, *, endpoint: str) -> tuple[Offer, PriceRecord]:
    """Return the model that a request names and its price; raises GatewayError (400, 403, 404)."""
    model_name = body.get("model")
    if not isinstance(model_name, str) or not model_name:
        raise GatewayError(400, "missing_model", "You must provide a model parameter.", param="model")
    check_scope(caller, endpoint=endpoint, model_name=model_name)
    offer = catalog.offers.get(model_name)
    price = catalog.get_price(caller.tenant.tenant_id, offer.model.served_model_id) if offer else None
    if offer is None or price is None:
        raise _build_model_not_found(model_name)
    return offer, price


def _parse_body(body: bytes) -> dict[str, Any]:
    try:
        parsed = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise GatewayError(400, "invalid_json", "We could not parse the JSON body of your request.") from None
    if not isinstance(parsed, dict):
        raise GatewayError(400, "invalid_json", "The body of the request must be a JSON object.")
    return parsed


def _parse_request(exchange: Exchange, endpoint: str) -> CallRequest:
    body = exchange.body
    parsed = _parse_body(body)
    options = parsed.get("stream_options")
    return CallRequest(
        endpoint=endpoint,
        body=body,
        json=parsed,
        streamed=parsed.get("stream") is True and endpoint != "embeddings",
        client_asked_usage=isinstance(options, dict) and options.get("include_usage") is True,
        headers=(
            *((name, exchange.headers[name]) for name in FORWARDED_HEADERS if name in exchange.headers),
            (b"x-request-id", exchange.call_id.encode()),
        ),
    )


def _describe_model(model: ServedModelRecord) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_at_s,
        "owned_by": model.owned_by,
        "max_model_len": model.context_tokens_max,
    }


def _build_model_not_found(name: str) -> GatewayError:
    message = f"The model '{name}' does not exist or you do not have access to it."
    return GatewayError(404, "model_not_found", message, param="model")

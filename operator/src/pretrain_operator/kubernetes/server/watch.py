"""kopf's part: it watches the resource and answers liveness probes. It writes nothing to any object.

`kopf.run_tasks`, and so `kopf.operator`, would cancel every task of the event loop when it ends, also those that are
not its own. Its tasks are therefore spawned and ended here.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from typing import Any, cast

import kopf

from pretrain_operator.kubernetes.client.api import JOBS, Object
from pretrain_operator.kubernetes.client.transport import configured
from pretrain_operator.kubernetes.server.options import Options

STOP_SECONDS = 5.0


class WatchEnded(Exception):
    """kopf gave up, as it does after errors in a watch: start the process again."""


async def watch_jobs(
    options: Options,
    changed: Callable[[str, Object], None],
    check_health: Callable[[], None],
    own_signals: Callable[[], None],
) -> None:
    """Watch the jobs until cancelled. `changed` is told ADDED, MODIFIED or DELETED, and "" for those found at the
    start; what `check_health` raises fails the liveness probe. kopf takes the process's signals for itself:
    `own_signals` is called to take them back. Raises WatchEnded."""
    registry = kopf.OperatorRegistry()
    _register(registry, options, changed, check_health)
    stop = asyncio.Event()
    tasks = await kopf.spawn_tasks(
        registry=registry,
        settings=_settings(),
        liveness_endpoint=f"http://{options.listen or '0.0.0.0'}:{options.probe_port}/healthz",
        stop_flag=stop,
        clusterwide=options.namespace is None,
        namespaces=[] if options.namespace is None else [options.namespace],
    )
    own_signals()
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        errors = [error for task in done if not task.cancelled() and (error := task.exception()) is not None]
        raise WatchEnded("the watch of the jobs ended") from (errors[0] if errors else None)
    finally:
        stop.set()  # otherwise it would have the process killed a while later
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=STOP_SECONDS)


def _register(
    registry: kopf.OperatorRegistry,
    options: Options,
    changed: Callable[[str, Object], None],
    check_health: Callable[[], None],
) -> None:
    async def job_changed(event: Any, **_: object) -> None:
        changed(event["type"] or "", event["object"])

    async def healthy(**_: object) -> str:
        check_health()
        return "ok"

    async def login(**_: object) -> kopf.ConnectionInfo:
        return await _connection(options)

    on = cast(Any, kopf.on)
    on.event(JOBS.group, JOBS.version, JOBS.plural, registry=registry)(job_changed)
    on.probe(registry=registry, id="healthy")(healthy)
    on.login(registry=registry, retries=3, backoff=1.0)(login)


async def _connection(options: Options) -> kopf.ConnectionInfo:
    """The same credentials as everything else's; asked for again when the API server refuses them."""
    configuration = await configured(options.kubeconfig)
    header = configuration.get_api_key_with_prefix("BearerToken")
    if inspect.isawaitable(header):
        header = await header
    scheme, _, token = (header or "").rpartition(" ")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        scheme=scheme or ("Bearer" if token else None),
        token=token or None,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
    )


class _NoComparison(kopf.DiffBaseStorage):
    """No object is compared with what it was: otherwise kopf would copy it, several times, at every event."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        pass


def _settings() -> kopf.OperatorSettings:
    settings = kopf.OperatorSettings()
    settings.peering.standalone = True
    settings.scanning.disabled = True  # needs no right on namespaces and CustomResourceDefinitions
    settings.watching.inactivity_timeout = 70
    settings.networking.connect_timeout = 10
    settings.networking.request_timeout = 30
    settings.networking.enforce_retry_after = True
    settings.persistence.diffbase_storage = _NoComparison()
    settings.posting.enabled = False
    settings.posting.loggers = False
    settings.process.ultimate_exiting_timeout = 25
    settings.queueing.exit_timeout = 0.5
    return settings

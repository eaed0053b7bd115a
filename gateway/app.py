"""Puts the gateway together: settings in, a WSGI application out."""

from __future__ import annotations

from flask_openapi3.models.info import Info
from flask_openapi3.openapi import OpenAPI

from common import registry
from common.broker import Broker
from common.errors import ConfigurationError
from common.problem import Problem
from common.settings import Settings
from common.storage import open_storage
from gateway import (
    admission,
    dashboard,
    dialects,
    docs,
    failed,
    fleet,
    health,
    history,
    images,
    inputs,
    keys,
    metrics,
    operate,
    ops,
    problems,
    retries,
    store,
    templates,
    thumbnails,
)
from gateway.api import Api
from gateway.described import SCHEMES
from gateway.dialects.base import Gateway
from gateway.diskguard import DiskGuard
from gateway.images import Images
from gateway.links import Links
from gateway.polls import Polls
from gateway.requestlog import RequestLog
from gateway.tasks import Tasks
from gateway.traffic import Traffic
from gateway.webhooks import routes as webhooks
from gateway.webhooks.targets import Targets

VERSION = "1.0"  # of the API, not of the program
# where a server finds what to start and close, in app.extensions
TASKS, WATCH, TRAFFIC = "zfleet.tasks", "zfleet.watch", "zfleet.traffic"


def create_app(settings: Settings, broker: Broker | None = None) -> OpenAPI:
    """Return the application. Nothing is connected or started before the first request.

    Raises ConfigurationError for a model, storage or dialect that there is not, for dialects that share a route, and
    for a prompt template with a mistake in it.
    """
    app = OpenAPI(
        __name__,
        info=Info(title="zfleet", version=VERSION, description="Text to image on a fleet of GPUs."),
        security_schemes=SCHEMES,
        validation_error_model=Problem,
        validation_error_status=problems.DEFAULT,
        doc_ui=False,
        static_folder=None,
    )
    app.config["MAX_CONTENT_LENGTH"] = settings.body_limit_bytes
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False  # no page of another origin is let in, so preflights are refused
    app.url_map.merge_slashes = False  # an odd path is unknown, not redirected
    problems.install(app)
    catalogue = settings.catalogue()
    prompts = templates.load(settings)
    broker = broker or Broker(settings)
    doorkeeper = admission.Doorkeeper(broker, settings)
    admission.install(app, doorkeeper)
    storage = store.Store(open_storage(settings), settings)
    disk = DiskGuard(storage, settings)
    pictures = inputs.Inputs(storage, disk, settings)
    targets = Targets(settings.webhook_allow)
    gateway = Gateway(
        tasks=Tasks(broker, catalogue, disk, pictures, prompts, targets),
        images=Images(storage, settings),
        pictures=pictures,
        links=Links(broker.shared_secret, settings.public_url),
        catalogue=catalogue,
        aliases=settings.aliases(),
    )
    repeats = retries.Retries(gateway.tasks, broker, catalogue, disk, pictures, targets)
    checkup = health.Checkup(broker, catalogue, disk, store.Reach(storage), settings)
    overview = fleet.Overview(broker, checkup)
    watch = fleet.Watch(overview)
    app.extensions |= {TASKS: gateway.tasks, WATCH: watch}
    polls = Polls(app.wsgi_app, doorkeeper, gateway.tasks.hub)
    traffic = Traffic(broker, storage)
    app.extensions[TRAFFIC] = traffic
    app.wsgi_app = RequestLog(polls, traffic.answered)  # type: ignore[method-assign]  # Flask's own way of wrapping
    _register(app, ops.create(broker, catalogue, prompts))
    _register(app, health.create(checkup))
    _register(app, fleet.create(overview, watch, doorkeeper))
    _register(app, operate.create(broker, overview, watch))
    _register(app, history.create(broker))
    _register(app, metrics.create(broker, catalogue, traffic.tell))
    _register(app, retries.create(repeats))
    _register(app, keys.create(broker))
    _register(app, failed.create(failed.Clearing(broker, gateway.tasks, repeats, storage)))
    _register(app, images.create(gateway.tasks, gateway.images, gateway.links, doorkeeper))
    _register(app, thumbnails.create(gateway.tasks, thumbnails.Thumbnails(storage)))
    _register(app, inputs.create(pictures))
    _register(app, webhooks.create(broker))
    for name in settings.dialects:
        _register(app, registry.load(dialects, name).create(gateway))
    docs.install(app)
    dashboard.install(app)
    return app


def start(app: OpenAPI) -> None:
    """Begin what goes on beside the requests. For a server, in the process that serves."""
    traffic: Traffic = app.extensions[TRAFFIC]
    traffic.start()


def stop(app: OpenAPI) -> None:
    """End that, when no more requests come."""
    traffic: Traffic = app.extensions[TRAFFIC]
    traffic.stop()


def close(app: OpenAPI) -> None:
    """Answer everybody who waits with what is known now. For a server that stops."""
    tasks: Tasks = app.extensions[TASKS]
    watch: fleet.Watch = app.extensions[WATCH]
    tasks.close()
    watch.close()


def _register(app: OpenAPI, api: Api) -> None:
    if taken := sorted(app.paths.keys() & api.paths.keys()):
        raise ConfigurationError(f"{api.import_name} and another part of the gateway both have {', '.join(taken)}")
    app.register_api(api)

"""The application that gunicorn serves, made from the environment. gevent has patched the process by now."""

from __future__ import annotations

import atexit

from common import telemetry, tracing
from common.settings import load_settings
from gateway.app import create_app, start, stop

_settings = load_settings()
telemetry.configure(_settings, "gateway")
tracing.configure("gateway")

app = create_app(_settings)
start(app)
atexit.register(stop, app)

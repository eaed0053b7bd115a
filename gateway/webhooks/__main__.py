"""`python -m gateway.webhooks`: one courier, until SIGTERM."""

from __future__ import annotations

import signal
import sys

from common import telemetry
from common.broker import Broker
from common.errors import ConfigurationError
from common.servicemanager import service_manager
from common.settings import load_settings
from gateway.webhooks.courier import Courier
from gateway.webhooks.targets import Targets


def main() -> int:
    """Run the courier; returns the exit code."""
    try:
        settings = load_settings()
        telemetry.configure(settings, "webhooks")
        manager = service_manager(settings.alive_file)
        courier = Courier(Broker(settings), Targets(settings.webhook_allow), manager=manager)
    except ConfigurationError as error:
        sys.stderr.write(f"zfleet: {error.message}\n")
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: courier.stop())
    courier.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())

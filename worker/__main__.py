"""`python -m worker`: the supervisor, which starts `python -m worker child NAME DEVICE PIPE HEARTBEAT` for each GPU."""

from __future__ import annotations

import signal
import sys

from common import tracing
from common.errors import ConfigurationError
from common.settings import load_settings
from common.telemetry import configure


def main(argv: list[str]) -> int:
    """Run the supervisor, or with `child` one worker, until stopped; returns the exit code."""
    try:
        settings = load_settings()
        if argv[:1] == ["child"]:
            from worker import gpu_worker

            name, device, pipe, heartbeat = argv[1:]
            return gpu_worker.main(name, device, settings, int(pipe), int(heartbeat))
        from worker.supervisor import Supervisor

        configure(settings, "supervisor")
        tracing.configure("supervisor")
        supervisor = Supervisor(settings)
    except ConfigurationError as error:
        sys.stderr.write(f"zfleet: {error.message}\n")
        return 2
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: supervisor.stop())
    code = supervisor.run()
    tracing.close()
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

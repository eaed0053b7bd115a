"""The command line. A mistake is one line on stderr and exit code 2; a refusal or failure one line and exit code 1."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from common.errors import ConfigurationError, FleetError
from zfleet.commands import doctor, fleet, generate, keys, local, logs, operate, serve, settings, tasks, top

MISTAKE = 2
FAILURE = 1
INTERRUPTED = generate.INTERRUPTED


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="zfleet", message="zfleet %(version)s")
@click.pass_context
def group(context: click.Context) -> None:
    """Pictures from prompts, from a fleet of GPUs.

    Settings come from ZFLEET_… variables; `zfleet settings` lists them.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (
    local.up, serve.gateway, serve.worker, serve.webhooks, generate.generate, tasks.submit, tasks.status, tasks.cancel,
    fleet.queue, fleet.workers, fleet.templates, operate.pause, operate.resume, operate.drain, operate.restart,
    top.top, doctor.doctor, logs.logs, keys.keys, settings.settings, local.demo, serve.alive,
):  # fmt: skip
    group.add_command(command)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line (None: the process's own) and return its exit code."""
    try:
        code = group.main(args=args, prog_name="zfleet", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return _complain("interrupted", INTERRUPTED)
    except click.UsageError as error:
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx else ""
        return _complain(error.format_message() + hint, MISTAKE)
    except click.ClickException as error:
        return _complain(error.format_message(), FAILURE)
    except ConfigurationError as error:
        return _complain(error.message, MISTAKE)
    except FleetError as error:
        return _complain(error.message, FAILURE)
    except BrokenPipeError:  # as in `zfleet queue | head -1`; there is nobody left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE


def _complain(message: str, code: int) -> int:
    click.echo(f"zfleet: {' '.join(message.split())}", err=True)
    return code

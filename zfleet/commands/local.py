"""`zfleet up` and `demo`: the whole fleet on this machine."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zfleet.commands import options
from zfleet.commands.generate import save

if TYPE_CHECKING:
    from common.schemas import TaskView
    from common.settings import Settings
    from zfleet.display import Lines
    from zfleet.interrupts import Interrupts
    from zfleet.stack import Stack

MEND_S = 0.2
DEMO_PROMPT = "a red circle left of a blue square"
DEMO_OUT = Path("out/demo.webp")


@click.command()
@click.option("--model", help="An alias, or several as turbo,base; else ZFLEET_MODELS.")
@click.option("--workers", type=click.IntRange(min=1), help="So many; else one per GPU, or one on the CPU.")
@click.option("--host", help="The gateway listens here; else ZFLEET_HOST.")
@click.option("--port", type=click.IntRange(0, 65535), help="The gateway's port; else ZFLEET_PORT.")
@options.insecure
def up(model: str | None, workers: int | None, host: str | None, port: int | None, insecure: bool | None) -> None:
    """Run everything here, until Ctrl-C.

    Redis (unless ZFLEET_REDIS_URL is set), the gateway and the workers.
    """
    from common.settings import load_settings
    from zfleet.display import Lines
    from zfleet.interrupts import Interrupts
    from zfleet.stack import Stack

    flags = {"models": model, "host": host, "port": port, "insecure": insecure}
    if workers is not None:
        flags |= _placement(load_settings(flags), workers)
    lines = Lines()
    try:
        with Interrupts() as interrupts, Stack(load_settings(flags), lines, interrupts) as stack:
            lines.say(_welcome(stack))
            while True:
                stack.mend()
                time.sleep(MEND_S)
    except KeyboardInterrupt:
        lines.say("Stopped.")  # asked for, and so no failure


@click.command()
@click.option("--prompt", default=DEMO_PROMPT, show_default=True, callback=options.readable)
@click.option("--out", type=click.Path(path_type=Path), default=DEMO_OUT, show_default=True)
@click.option("--model", default="pico", show_default=True)
def demo(prompt: str, out: Path, model: str) -> None:
    """Make one picture through a fleet of its own.

    Starts Redis, gateway and worker, submits the prompt over HTTP, saves the picture and stops everything again.
    """
    from common.settings import load_settings
    from zfleet.display import Lines
    from zfleet.interrupts import Interrupts
    from zfleet.stack import StackFailed

    began = time.monotonic()
    image_format = _require_target(out)
    lines = Lines()
    folder = tempfile.mkdtemp(prefix="zfleet-demo-")
    # whatever this machine's fleet is set to
    plain = {"host": "127.0.0.1", "storage": "local", "x_accel": "", "dialects": "native"}
    try:
        settings = load_settings({"models": model, "data_dir": folder, **plain})
        with Interrupts() as interrupts:
            _paint(settings, lines, interrupts, prompt, out, image_format)
    except StackFailed:
        folder = ""  # the error names the logs in it
        raise
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    lines.say(f"Done in {time.monotonic() - began:.1f} s; everything that was started is stopped.\n{_farewell()}")


def _paint(
    settings: Settings, lines: Lines, interrupts: Interrupts, prompt: str, out: Path, image_format: str | None
) -> None:
    from zfleet.client import Client, TaskFailed
    from zfleet.display import TaskProgress
    from zfleet.stack import Stack

    with Stack(settings, lines, interrupts, embedded=True, redis_port=0) as stack, Client(stack.url) as client:
        lines.say(f"Submitting to {stack.url}: {prompt}")
        task_id = client.submit(prompt, format=image_format).task_id
        with TaskProgress() as progress:

            def show(view: TaskView) -> None:
                stack.check()
                progress.show(view)

            view = client.wait(task_id, on_progress=show)
        if view.status != "succeeded":
            raise TaskFailed(view)
        save(client, view, out)


def _require_target(out: Path) -> str | None:
    """Make sure that the picture can be written before anything starts; return its format."""
    from zfleet import pictures

    try:
        image_format = pictures.format_of(out)
        with contextlib.suppress(OSError):  # told in better words below
            out.parent.mkdir(parents=True, exist_ok=True)
        pictures.require_writable([out])
    except pictures.CannotWrite as error:
        raise click.UsageError(error.message) from None
    return image_format


def _placement(settings: Settings, workers: int) -> dict[str, Any]:
    """Return the settings for so many workers: a GPU each, or all of them on the CPU."""
    from common.errors import ConfigurationError
    from worker import gpu

    catalogue = settings.catalogue()
    simulated = all(spec.pipeline == "simulated" for spec in catalogue.values())
    devices = [gpu.CPU] if simulated else gpu.choose(settings.devices)
    if devices == [gpu.CPU]:
        return {"devices": gpu.CPU, "workers_per_device": workers}
    if workers > len(devices):
        raise ConfigurationError(
            f"--workers {workers}: this machine has {len(devices)} GPUs, and each takes one worker"
        )
    return {"devices": ",".join(devices[:workers]), "workers_per_device": 1}


def _welcome(stack: Stack) -> str:
    from common.settings import Settings, mask_url

    settings = stack.settings
    body = """'{"prompt": "a red circle"}'"""
    url = "" if settings.url == Settings.model_fields["url"].default else f" --url {settings.url}"
    key = ' -H "Authorization: Bearer $ZFLEET_API_KEY"' if stack.guarded else ""
    return f"""
zfleet is up: {", ".join(settings.models)}
  API    {settings.url}   (in a browser: the dashboard; /docs: the calls)
  Redis  {mask_url(settings.redis_url)}
  Data   {settings.data_dir}   (logs: {stack.log_dir})

  curl -s {settings.url}/api/submit{key} -H 'Content-Type: application/json' -d {body}
  {_program()} generate "a red circle" -o circle.webp{url}

Ctrl-C stops it."""


def _farewell() -> str:
    program = _program()
    return f"""
  {program} up --model pico                        a fleet that stays, until Ctrl-C
  {program} generate "a blue star" -o star.webp    a picture from it, in another terminal"""


def _program() -> str:
    """Return how this very program is called from the user's shell."""
    python = Path(sys.executable)
    if shutil.which("zfleet") == str(python.with_name("zfleet")):
        return "zfleet"
    with contextlib.suppress(ValueError):
        python = python.relative_to(Path.cwd())
    return f"{shlex.quote(str(python))} -m zfleet"

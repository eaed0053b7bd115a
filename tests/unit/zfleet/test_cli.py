from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.schemas import GenerateRequest
from common.settings import Settings, child_environment, load_settings
from tests.servers import free_port
from tests.unit.zfleet.stub import PIXELS, TASK, Reply, StubGateway, accepted, problem, view
from zfleet import cli, pictures
from zfleet.commands import tasks
from zfleet.commands.generate import generate

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("ZFLEET_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the complaint, after making sure that it is one line on stderr and nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("zfleet: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


def names() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("paint", "No such command 'paint'"),
        ("--loud", "--loud"),
        ("generate", "PROMPT"),
        ("generate | ", "blank"),
        ("generate a|b", "extra argument"),
        ("generate x|--width|wide", "--width"),
        ("generate x|--format|gif", "webp"),
        ("generate --template|poster|--set|product", "'product' is not NAME=TEXT"),
        ("generate --template|poster|--set|a=b|--set|a=c", "a is given twice"),
        ("generate --set|a=b", "PROMPT"),
        ("generate x|--priority|urgent", "high"),
        ("generate x|-n|0", "-n"),
        ("generate x|--timeout|0", "--timeout"),
        ("generate x|-o|no such folder/x.png", "no folder"),
        ("generate x|-o|.", "is a folder"),
        ("generate x|--preview|no such folder/p.webp", "no folder"),
        ("generate x|-o|/dev/null", "no regular file"),
        ("generate x|-o|x.gif", ".webp"),
        ("generate x|-o|" + "x" * 300 + ".png", "too long"),
        ("generate x|--init-image|none.png", "'none.png' does not exist"),
        ("generate x|--init-image|.", "is a directory"),
        ("generate x|--mask|img_1", "'img_1' does not exist"),
        ("generate x|--reference|none.png", "--reference"),
        ("submit x|--control|none.png", "--control"),
        ("generate x|--strength|half", "--strength"),
        ("generate x|--lora|ink:much", "'ink:much' is not NAME or NAME:SCALE"),
        ("generate x|--url|nonsense", "not a gateway's URL"),
        ("generate x|--url", "--url"),
        ("submit", "PROMPT"),
        ("status", "ID"),
        ("status x|--wait|soon", "--wait"),
        ("cancel a|b", "extra argument"),
        ("queue extra", "extra argument"),
        ("workers --yaml", "--yaml"),
        ("settings extra", "extra argument"),
        ("up --model|nope", "nope"),
        ("up --workers|0", "--workers"),
        ("up --port|70000", "--port"),
        ("gateway --port|x", "--port"),
        ("worker --models|nope", "nope"),
        ("demo --prompt| ", "blank"),
        ("demo --out|x.gif", ".webp"),
        ("demo --model|nope", "nope"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(line: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, _, rest = line.partition(" ")
    args = [command, *rest.split("|")] if rest else [command]
    assert cli.main(args) == 2
    assert says in one_line(capsys)


def test_a_prompt_that_is_no_utf8_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["submit", "caf\udce9"]) == 2
    assert "UTF-8" in one_line(capsys)


@pytest.mark.parametrize(("variable", "value"), [("ZFLEET_PORT", "abc"), ("ZFLEET_LEASE_S", "-1"), ("ZFLEET_URL", "x")])
def test_a_bad_setting_is_a_mistake(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, value)
    assert cli.main(["queue"]) == 2
    assert value in one_line(capsys)


@pytest.mark.parametrize("line", [["queue"], ["workers"], ["status", "x"], ["submit", "x"], ["generate", "x"]])
def test_no_gateway_is_one_line_and_exit_code_1(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*line, "--url", f"http://127.0.0.1:{free_port()}"]) == 1
    assert "no gateway answers" in one_line(capsys)


def test_a_refusal_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with StubGateway(problem(422, "invalid_request", "width: must be a\nmultiple of 16")) as stub:
        assert cli.main(["submit", "x", "--width", "63", "--url", stub.url]) == 1
    assert one_line(capsys) == "zfleet: width: must be a multiple of 16\n"


def test_help_goes_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    for args in ([], ["--help"], ["-h"], ["generate", "--help"]):
        assert cli.main(args) == 0
        assert "Usage: zfleet" in capsys.readouterr().out


def test_generate_saves_the_picture_and_prints_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    replies = (accepted(), view("queued"), view("running", 2), view("succeeded", 4), Reply(body=PIXELS))
    with StubGateway(*replies) as stub:
        assert cli.main(["generate", "a cat", "-o", "my cat.png", "--seed", "7", "--url", stub.url]) == 0
    assert Path("my cat.png").read_bytes() == PIXELS
    assert names() == ["my cat.png"], "nothing else is left behind"
    out, err = capsys.readouterr()
    assert out == "my cat.png\n"
    assert err.splitlines() == ["queued, 2 ahead", "running, step 2 of 4", "succeeded"]
    assert stub.asked[0].body == {"prompt": "a cat", "seed": 7, "n": 1, "format": "png"}


def test_generate_starts_from_pictures_and_paints_with_loras() -> None:
    for name in ("init.png", "mask.png", "r1.png", "r2.png", "c.png"):
        Path(name).write_bytes(name.encode())
    handle = f"img_{'0' * 32}"
    line = [
        "submit", "a cat", "--init-image", "init.png", "--strength", "0.5", "--mask", "mask.png", "--control", handle,
        "--control-scale", "0.5", "--reference", "r1.png", "--reference", handle, "--reference", "r2.png",
        "--lora", "ink:0.8", "--lora", "clay",
    ]  # fmt: skip
    with StubGateway(accepted()) as stub:
        assert cli.main([*line, "--url", stub.url]) == 0
    assert stub.asked[0].body == {
        "request": {
            "prompt": "a cat", "n": 1, "strength": 0.5, "control_image": handle, "control_scale": 0.5,
            "reference_images": [handle], "loras": [{"name": "ink", "scale": 0.8}, {"name": "clay"}],
        },
        "init_image": [("init.png", b"init.png")], "mask_image": [("mask.png", b"mask.png")],
        "reference_images": [("r1.png", b"r1.png"), ("r2.png", b"r2.png")],
    }  # fmt: skip


def test_every_field_of_a_request_has_an_option_but_those_for_programs() -> None:
    fields = set(GenerateRequest.model_fields)
    for_programs = {"metadata", "webhook"}
    for command, missing in ((tasks.submit, for_programs | {"preview"}), (generate, for_programs)):
        assert fields - {option.name for option in command.params} == missing


def test_guidance_and_a_deadline_can_be_told() -> None:
    line = ["submit", "x", "--cfg-normalization", "1", "--cfg-truncation", "0.5", "--deadline", "60"]
    with StubGateway(accepted()) as stub:
        assert cli.main([*line, "--url", stub.url]) == 0
    assert stub.asked[0].body == {
        "prompt": "x", "n": 1, "cfg_normalization": 1.0, "cfg_truncation": 0.5, "deadline_s": 60.0,
    }  # fmt: skip


def painting(step: int, preview: bytes) -> Reply:
    url = f"data:image/webp;base64,{base64.b64encode(preview).decode()}"
    return view("running", step, progress={"step": step, "steps": 4, "preview": url})


def test_the_newest_preview_is_kept_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    replies = (accepted(), painting(1, b"blurred"), painting(2, b"clear"), view("succeeded"), Reply(body=PIXELS))
    with StubGateway(*replies) as stub:
        assert cli.main(["generate", "x", "-o", "x.webp", "--preview", "p.webp", "--url", stub.url]) == 0
        assert stub.asked[0].body["preview"] is True
    assert Path("p.webp").read_bytes() == b"clear"
    assert names() == ["p.webp", "x.webp"]
    assert capsys.readouterr().out == "x.webp\n"


def test_a_preview_that_cannot_be_kept_costs_no_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pictures, "require_writable", lambda _: None)
    with StubGateway(accepted(), painting(1, b"blurred"), view("succeeded"), Reply(body=PIXELS)) as stub:
        assert cli.main(["generate", "x", "-o", "x.webp", "--preview", "gone/p.webp", "--url", stub.url]) == 0
    assert names() == ["x.webp"]
    assert "zfleet: warning: gone/p.webp: " in capsys.readouterr().err


def test_several_pictures_are_numbered(capsys: pytest.CaptureFixture[str]) -> None:
    with StubGateway(accepted(), view("succeeded", 4, pictures=2), Reply(body=PIXELS)) as stub:
        assert cli.main(["generate", "x", "-n", "2", "-o", "out.jpg", "--url", stub.url]) == 0
    assert capsys.readouterr().out == "out-1.jpg\nout-2.jpg\n"
    assert stub.asked[0].body["format"] == "jpeg"


def test_format_goes_before_the_ending_and_the_default_name_is_the_tasks() -> None:
    with StubGateway(accepted(), view("succeeded"), Reply(body=PIXELS)) as stub:
        assert cli.main(["generate", "x", "--format", "webp", "-o", "x.gif", "--url", stub.url]) == 0
    with StubGateway(accepted(), view("succeeded"), Reply(body=PIXELS)) as stub:
        assert cli.main(["generate", "x", "--url", stub.url]) == 0
        assert "format" not in stub.asked[0].body
    assert names() == [f"{TASK}.webp", "x.gif"]


def test_a_failed_task_is_exit_code_1_with_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    error = {"code": "pipeline_failed", "message": "out of paint", "retryable": False}
    with StubGateway(accepted(), view("failed", error=error)) as stub:
        assert cli.main(["generate", "x", "-o", "x.png", "--url", stub.url]) == 1
    assert f"zfleet: task {TASK} failed: out of paint (pipeline_failed)\n" in capsys.readouterr().err
    assert names() == []


def test_a_warning_is_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    with StubGateway(accepted(), view("succeeded", warnings=["the prompt was cut"]), Reply(body=PIXELS)) as stub:
        assert cli.main(["generate", "x", "-o", "x.png", "--url", stub.url]) == 0
    assert "zfleet: warning: the prompt was cut\n" in capsys.readouterr().err


def test_a_time_out_cancels_the_task(capsys: pytest.CaptureFixture[str]) -> None:
    with StubGateway(accepted(), view("running", 1)) as stub:
        assert cli.main(["generate", "x", "--timeout", "0.3", "-o", "x.png", "--url", stub.url]) == 1
    assert stub.asked[-1].path == f"/api/cancel/{TASK}"
    assert f"after 0.3 s; task {TASK} is canceled" in capsys.readouterr().err


def test_ctrl_c_cancels_the_task_and_says_so(tmp_path: Path) -> None:
    with StubGateway(accepted(), view("running", 1)) as stub:
        command = [sys.executable, "-m", "zfleet", "generate", "x", "-o", str(tmp_path / "x.png"), "--url", stub.url]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 20
        while len(stub.asked) < 3 and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(2)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stub.asked[-1].path == f"/api/cancel/{TASK}"
    assert out == ""
    assert err.splitlines()[-1] == f"zfleet: task {TASK} is canceled"
    assert "Traceback" not in err


def test_submit_prints_the_id_alone(capsys: pytest.CaptureFixture[str]) -> None:
    with StubGateway(accepted()) as stub:
        assert cli.main(["submit", "x", "--url", stub.url]) == 0
        assert capsys.readouterr().out == f"{TASK}\n"
        assert cli.main(["submit", "x", "--json", "--url", stub.url]) == 0
        assert json.loads(capsys.readouterr().out)["task_id"] == TASK


def test_status_prints_and_waits(capsys: pytest.CaptureFixture[str]) -> None:
    with StubGateway(view("running", 1), view("succeeded", 4)) as stub:
        assert cli.main(["status", TASK, "--wait", "20", "--url", stub.url]) == 0
    out = capsys.readouterr().out
    assert "status      succeeded" in out
    assert f"image       {stub.url}/view/{TASK}/0.webp" in out
    assert stub.asked[0].path.endswith("?wait=20")
    assert len(stub.asked) == 2


def test_status_of_a_failed_task_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    error = {"code": "worker_crashed", "message": "three times", "retryable": False}
    with StubGateway(view("failed", error=error)) as stub:
        assert cli.main(["status", TASK, "--json", "--url", stub.url]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["status"] == "failed"
    assert "three times" in err


def test_queue_and_workers_are_tables(capsys: pytest.CaptureFixture[str]) -> None:
    queue = {
        "name": "图.high.default", "model": "图", "priority": "high", "tenant": "default", "queued": 3,
        "running": 1, "oldest_age_seconds": 75,
    }  # fmt: skip
    with StubGateway(Reply(body={"queues": [queue]})) as stub:
        assert cli.main(["queue", "--url", stub.url]) == 0
        assert capsys.readouterr().out == (
            "MODEL  PRIORITY  TENANT   QUEUED  RUNNING  OLDEST\n图     high      default  3       1        75 s\n"
        )
        assert cli.main(["queue", "--json", "--url", stub.url]) == 0
        assert json.loads(capsys.readouterr().out)[0]["queued"] == 3
    with StubGateway(Reply(body={"workers": []})) as stub:
        assert cli.main(["workers", "--url", stub.url]) == 0
        assert capsys.readouterr().out.startswith("WORKER  STATE")


def test_settings_lists_every_setting_with_its_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ZFLEET_REDIS_URL", "redis://me:secret@10.0.0.1:6379/0")
    assert cli.main(["settings"]) == 0
    out = capsys.readouterr().out
    assert "secret" not in out
    assert "redis://me:***@10.0.0.1:6379/0  environment" in out
    assert cli.main(["settings", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in rows} == {f"ZFLEET_{name.upper()}" for name in Settings.model_fields}


def test_the_key_is_shown_to_the_gateway_and_masked_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = f"zfk_{'0' * 12}_{'f' * 64}"
    monkeypatch.setenv("ZFLEET_API_KEY", key)
    with StubGateway(accepted(), view("running", 1)) as stub:
        assert cli.main(["generate", "x", "--timeout", "0.3", "-o", "x.png", "--url", stub.url]) == 1
    assert stub.asked[-1].path == f"/api/cancel/{TASK}"
    assert {asked.headers.get("Authorization") for asked in stub.asked} == {f"Bearer {key}"}
    for line in (["settings"], ["settings", "--json"], ["queue", "--url", "http://127.0.0.1:1"]):
        cli.main(line)
    out, err = capsys.readouterr()
    assert key not in out + err
    assert re.search(r"ZFLEET_API_KEY +\*+ +environment", out)


def test_children_are_not_given_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZFLEET_API_KEY", "zfk_secret")
    monkeypatch.setenv("zfleet_api_key", "zfk_secret")
    settings = load_settings({"port": 1})
    assert settings.api_key is not None
    environment = child_environment(settings)
    assert "zfk_secret" not in environment.values()
    assert not [name for name in environment if name.upper() == "ZFLEET_API_KEY"]
    assert environment["ZFLEET_PORT"] == "1"


def test_a_closed_pipe_is_no_traceback() -> None:
    command = f"{sys.executable} -m zfleet settings | head -1 > /dev/null; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.alone
def test_help_is_quick() -> None:
    best = min(_time_of_help() for _ in range(5))
    assert best < 0.5


def _time_of_help() -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "zfleet", "--help"], cwd=ROOT, check=True, capture_output=True, timeout=60)
    return time.perf_counter() - began

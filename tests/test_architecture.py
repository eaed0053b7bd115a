"""The walls of the house. docs/architecture.md says why they stand where they do."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from types import ModuleType

import pytest

import common.storage
import gateway.dialects
import worker.pipelines
from common import registry
from common.errors import ConfigurationError

ROOT = Path(__file__).parents[1]
PACKAGES = ("common", "gateway", "worker", "zfleet")
MODULES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_LINES = 400

# The rooms that a rule leaves open
ENVIRONMENT = {"common/settings.py"}
# Of the broker, which others reach by it
PARTS = {"link", "fleetview", "keyring", "operating", "ratelimit", "outbox", "figures", "serverfacts"}
KEYS = {"common/broker.py"} | {f"common/{part}.py" for part in PARTS}
REDIS = {"common/broker.py", "common/connection.py", "worker/gpu_worker.py"}  # the last for RQ's own registration
RQ = {"worker/gpu_worker.py"}
STATUS = {"gateway/problems.py", "zfleet/client.py", "gateway/webhooks/post.py"}  # one gives them, the others read them
ENVIRONMENT_CALLS = {"environ", "environb", "getenv", "getenvb", "putenv"}
REDIS_CALLS = {"execute_command", "evalsha", "register_script", "from_url", "pubsub"}
ERROR_STATUSES = {status.value for status in HTTPStatus if status >= HTTPStatus.BAD_REQUEST}
SKIPPED_FOLDERS = {"__pycache__", "build", "dist", "node_modules", "out", "results", "zfleet.egg-info"}


def tree(module: Path) -> ast.Module:
    return ast.parse((ROOT / module).read_text("utf-8"), str(module))


def imported(module: Path) -> Iterator[str]:
    """Every module that this one imports, wherever it does so."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(module: Path, name: str) -> bool:
    return any(found == name or found.startswith(name + ".") for found in imported(module))


def test_who_may_import_whom() -> None:
    program = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def loaded_by(program: str) -> set[str]:
    """Run a program in a fresh process; return the top-level modules that it has loaded."""
    program += "\nimport sys; print('\\n' + ' '.join({name.partition('.')[0] for name in sys.modules}))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ZFLEET_")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


MODEL = {"torch", "diffusers", "transformers", "accelerate", "safetensors"}
WEB = {"flask", "werkzeug", "flask_openapi3", "gunicorn", "gevent"}
COMMON = sorted(".".join(m.with_suffix("").parts).removesuffix(".__init__") for m in MODULES if m.parts[0] == "common")


@pytest.mark.parametrize(
    ("program", "without"),
    [
        ("import " + ", ".join(COMMON), MODEL | WEB | {"gateway", "worker", "zfleet", "rq"}),
        ("import gateway.app", MODEL | {"worker", "zfleet", "rq"}),
        ("import gateway.webhooks.__main__", MODEL | {"worker", "zfleet", "rq", "gunicorn", "gevent"}),
        ("import worker.supervisor, worker.__main__", MODEL | WEB | {"gateway", "zfleet", "rq"}),
        ("import worker.gpu_worker", MODEL | WEB | {"gateway", "zfleet"}),
        ("import worker.pipelines.simulated", MODEL | WEB | {"redis", "rq"}),
        ("import worker.pico", MODEL),
        ("import zfleet.client", MODEL | WEB | {"gateway", "worker", "redis", "rq"}),
        (
            "import zfleet.doctor.compute, zfleet.doctor.edge, zfleet.doctor.files, zfleet.doctor.storage, "
            "zfleet.doctor.store, zfleet.top",
            MODEL | WEB | {"gateway", "worker", "rq"},
        ),
        ("import zfleet.stack", MODEL | WEB | {"gateway", "worker", "rq"}),
        (
            "from zfleet.cli import main; assert main(['--help']) == 0",
            MODEL | WEB | {"gateway", "worker", "redis", "rq", "pydantic", "requests", "rich"},
        ),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_what_a_fresh_process_loads(program: str, without: set[str]) -> None:
    assert loaded_by(program) & without == set()


@pytest.mark.parametrize("port", [common.storage, gateway.dialects, worker.pipelines], ids=lambda port: port.__name__)
def test_only_the_chosen_module_of_a_port_loads(port: ModuleType) -> None:
    for name in ("../settings", "os", "base", "__init__", "", ".", "a.b", "nope"):
        with pytest.raises(ConfigurationError, match="there are:"):
            registry.load(port, name)
    names = registry.discover(port)
    files = {path.stem for path in Path(port.__path__[0]).glob("*.py")} - {"__init__", "base"}
    assert set(names) == {name for name in files if not name.startswith("_")}
    members = [f"{port.__name__}.{name}" for name in names]
    loaded_by(f"import sys, {port.__name__}; assert not set(sys.modules) & set({members})")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_keeps_to_its_room(module: Path) -> None:
    name = module.as_posix()
    if name not in KEYS:
        assert not imports(module, "common.keys"), "only the broker knows Redis keys"
        assert not any(imports(module, f"common.{part}") for part in PARTS), "others ask the broker"
    if name not in ENVIRONMENT:
        assert not [call for call in ENVIRONMENT_CALLS if imports(module, f"os.{call}")], "ask common/settings.py"
    if name not in REDIS:
        assert not imports(module, "redis"), "Redis is spoken to in common/broker.py and common/connection.py"
    if name not in RQ:
        assert not imports(module, "rq"), "only the worker registers with RQ"
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute):
            if name not in ENVIRONMENT and isinstance(node.value, ast.Name) and node.value.id == "os":
                assert node.attr not in ENVIRONMENT_CALLS, f"line {node.lineno}: ask common/settings.py"
            if name not in REDIS:
                assert node.attr not in REDIS_CALLS, f"line {node.lineno}: a Redis command outside the broker"
        if isinstance(node, ast.Constant) and name not in STATUS:
            number = isinstance(node.value, int) and not isinstance(node.value, bool)
            assert not (number and node.value in ERROR_STATUSES), f"line {node.lineno}: see gateway/problems.py"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and name != "common/keys.py":
            assert not node.value.startswith(("zf:", "rq:")), f"line {node.lineno}: a key outside common/keys.py"
    if name not in STATUS:
        assert not imports(module, "http.HTTPStatus"), "see gateway/problems.py"


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_can_be_read_in_one_go(module: Path) -> None:
    lines = len((ROOT / module).read_text("utf-8").splitlines())
    assert lines <= MAX_LINES


@pytest.mark.parametrize("script", sorted((ROOT / "common" / "lua").glob("*.lua")), ids=lambda path: path.name)
def test_a_script_spells_no_key(script: Path) -> None:
    code = re.sub(r"--.*", "", script.read_text("utf-8"))
    assert not re.search(r"""['"](zf|rq):""", code), "keys come from common/keys.py, as K.NAME"


def texts() -> Iterator[tuple[str, str]]:
    """Every text file of the project with its content."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [f for f in folders if f not in SKIPPED_FOLDERS and (not f.startswith(".") or f == ".ci")]
        for name in names:
            path = Path(folder, name)
            try:
                yield path.relative_to(ROOT).as_posix(), path.read_text("utf-8")
            except UnicodeDecodeError:
                continue  # a picture, a model


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    # spelled so that this file does not find itself
    machines = re.compile(r"(?<![\w.])/(?:root|home|Users|work|tmp/w|opt/(?:wheels|pypi))/")
    registries = re.compile(r"(?:--)?(?:extra-)?index-url|find-links|\bpypi[.]|pythonhosted[.]|download[.]pytorch")
    found = [
        f"{name}: {match[0]}"
        for name, text in texts()
        if name != "tests/test_architecture.py"
        for pattern in (machines, registries)
        if (match := pattern.search(text))
    ]
    assert found == []


def test_constraints_pin_every_package_exactly_and_torch_without_a_build() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []
    assert "torch==2.13.0" in lines

"""deploy/grafana: what Grafana and Prometheus load, and that it asks for what a fleet that works really tells.

A real Prometheus, configured as shipped, scrapes a real gateway; every panel's query then has to find something.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from prometheus_client.parser import text_string_to_metric_families

from common.broker import Broker
from common.cards import GpuReading
from common.settings import load_settings
from tests.deploy.promql import Wanted, wanted
from tests.fleet import await_final, ready_workers
from tests.integration.hardened import answers
from tests.servers import GatewayServer, RedisServer, Server, WorkerServer, binary, eventually, free_port
from tests.tenants import bearer, new_key
from tests.unit.gateway.fake_worker import FakeWorker

FOLDER = Path(__file__).parents[2] / "deploy" / "grafana"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text("utf-8"))
RULES = [
    rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text("utf-8"))["groups"] for rule in group["rules"]
]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]
SCALED = yaml.safe_load((FOLDER.parent / "kubernetes" / "overlays" / "gpu" / "scaling.yaml").read_text("utf-8"))
SCALING = [trigger["metadata"]["query"] for trigger in SCALED["spec"]["triggers"]]
PROMETHEUS_OWN = {"up": frozenset({"job", "instance"})}
EVERY = {"$__rate_interval": "10s", "$model": ".*"}


def filled(expression: str) -> str:
    """The expression as Grafana sends it."""
    for variable, value in EVERY.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression, "a variable that the dashboard does not have"
    return expression


# What is loaded


def test_figures_of_the_page_stand_out_where_the_alerts_would_come() -> None:
    source = (FOLDER.parents[1] / "gateway" / "web" / "js" / "fleet" / "figures.js").read_text("utf-8")
    marks = re.search(r"\[LATE_S, LATE_LOW_S, MOST_ERRORS\] = \[(.+), (.+), (.+)\]", source)
    assert marks is not None
    rules = {rule["alert"]: rule["expr"] for rule in RULES if "alert" in rule}
    assert re.findall(r"> ([0-9.]+)", rules["ZfleetOldestWait"]) == [marks[1], marks[2]]
    assert re.findall(r"> ([0-9.]+)", rules["ZfleetErrors"])[0] == marks[3]


def test_the_dashboard_is_built_of_its_panels() -> None:
    program = "import build, pathlib; print(build.text() == build.PLACE.read_text('utf-8'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=FOLDER, capture_output=True, text=True, check=False)
    assert done.stdout == "True\n", f"run: python deploy/grafana/build.py\n{done.stderr}"


def test_grafana_finds_what_it_needs() -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,40}", DASHBOARD["uid"]) and DASHBOARD["title"] and "id" not in DASHBOARD
    assert DASHBOARD["schemaVersion"] >= 36 and set(DASHBOARD["time"]) == {"from", "to"}
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    assert "${datasource}" in str(variables["model"]["datasource"]) and variables["model"]["allValue"] == ".*"
    ids = Counter(panel["id"] for panel in DASHBOARD["panels"])
    assert set(ids.values()) == {1}
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert all(titles) and not any("__inputs" in key for key in DASHBOARD)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_is_whole(panel: dict[str, Any]) -> None:
    assert panel["type"] in ("stat", "timeseries") and panel["targets"]
    letters = [target["refId"] for target in panel["targets"]]
    assert letters == sorted(set(letters))
    for part in (panel, *panel["targets"]):
        assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    for target in panel["targets"]:
        assert target["expr"] and target["legendFormat"]
    defaults = panel["fieldConfig"]["defaults"]
    steps = defaults["thresholds"]["steps"]
    assert steps[0]["value"] is None and defaults["unit"]
    assert isinstance(panel["options"], dict) and panel["fieldConfig"]["overrides"] == []


def test_panels_lie_side_by_side() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24 and place["h"] > 0
        cells = set(
            itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
        )
        assert not cells & taken, panel["title"]
        taken |= cells


def promtool(*arguments: str, cwd: Path) -> str:
    done = subprocess.run([binary("promtool"), *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_finds_nothing_wrong(tmp_path: Path) -> None:
    for name in ("prometheus.yml", "alerts.yml"):
        (tmp_path / name).write_text((FOLDER / name).read_text("utf-8"), "utf-8")
    (tmp_path / "zfleet.key").write_text("zfk_x\n", "utf-8")
    assert f"{len(RULES)} rules found" in promtool("check", "config", "prometheus.yml", cwd=tmp_path)


def test_each_alert_comes_and_stays_away_as_it_should() -> None:
    tests = yaml.safe_load((FOLDER / "alerts_test.yml").read_text("utf-8"))["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for rule in RULES:
        of_it = {bool(case.get("exp_alerts")) for case in cases if case["alertname"] == rule["alert"]}
        assert of_it == {True, False}, f"{rule['alert']} needs a case in which it comes and one in which it does not"
    assert "SUCCESS" in promtool("test", "rules", "alerts_test.yml", cwd=FOLDER)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_the_matter_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"].keys() == {"summary", "description"}
    named = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))
    assert all(named <= want.labels for want in wanted(rule["expr"])) or named == {"instance"}


# What a fleet tells


class Seen:
    """A fleet that works, and the Prometheus that watches it."""

    def __init__(self, url: str, figures: str) -> None:
        self.url = url
        self.told: dict[str, set[frozenset[str]]] = {}
        for family in text_string_to_metric_families(figures):
            for sample in family.samples:
                self.told.setdefault(sample.name, set()).add(frozenset(sample.labels))

    def ask(self, expression: str) -> list[float]:
        answer = requests.get(f"{self.url}/api/v1/query", params={"query": expression}, timeout=10).json()
        assert answer["status"] == "success", answer
        return [float(found["value"][1]) for found in answer["data"]["result"]]

    def is_ready(self) -> bool:
        try:
            return requests.get(f"{self.url}/-/ready", timeout=2).ok
        except requests.RequestException:
            return False

    def finds(self, expression: str) -> bool:
        return any(not math.isnan(value) for value in self.ask(expression))

    def has(self, want: Wanted) -> bool:
        if want.name in PROMETHEUS_OWN:
            return want.labels <= PROMETHEUS_OWN[want.name]
        return any(want.labels <= labels for labels in self.told.get(want.name, ()))


def watch(folder: Path, gateway: GatewayServer, key: str) -> Server:
    """A Prometheus, configured as shipped but for the address and the pace."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "400ms", "evaluation_interval": "1s"}
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [gateway.url.removeprefix("http://")]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")
    (folder / "alerts.yml").write_text((FOLDER / "alerts.yml").read_text("utf-8"), "utf-8")
    (folder / "zfleet.key").write_text(f"{key}\n", "utf-8")
    port = free_port()
    command = [
        binary("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    ]  # fmt: skip
    server = Server(command, log=folder / "prometheus.log")
    server.url = f"http://127.0.0.1:{port}"  # type: ignore[attr-defined]
    return server


class GpuWorker:
    """Stands for a worker on a GPU: beats, and counts as one does."""

    def __init__(self, broker: Broker) -> None:
        self._worker = FakeWorker(broker, name="host.gpu0.abc")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        for count in itertools.count(1):
            names = ("models_loaded_total", "models_unloaded_total", "embeds_hits", "embeds_misses")
            gpu = GpuReading(
                name="H200", index=0, memory_used_mb=1000, memory_total_mb=143_000, utilisation_percent=90,
                temperature_c=60, power_w=500.0, energy_j=100.0 * count,
            )  # fmt: skip
            self._worker.beat(gpu=gpu, counters=dict.fromkeys(names, float(count)), models=["other"])
            if self._stopping.wait(0.2):
                return


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("seen")
    with RedisServer(folder) as redis:
        settings = load_settings(
            {"redis_url": redis.url, "data_dir": folder / "data", "models": ("simulated",), "devices": "cpu",
             "simulated_image_ms": 40.0, "beat_s": 0.5}
        )  # fmt: skip
        broker = Broker(settings)
        key = new_key(broker, "prometheus", admin=True)
        with (
            GatewayServer(settings, folder / "gateway.log") as gateway,
            WorkerServer(settings, folder / "worker.log"),
            GpuWorker(broker),
            watch(folder, gateway, key) as prometheus,
        ):
            yield _worked(prometheus.url, gateway, broker, key)  # type: ignore[attr-defined]
        broker.close()


def _worked(url: str, gateway: GatewayServer, broker: Broker, key: str) -> Seen:
    """Let the fleet work, while it is watched, until there is something to be seen of everything."""
    ready_workers(broker, 2)
    watching, headers = Seen(url, ""), bearer(key)
    eventually(lambda: answers(gateway.url) and watching.is_ready(), within_s=20)
    until = time.monotonic() + 20
    unseen = [filled(target["expr"]) for _, target in QUERIES]
    while unseen and time.monotonic() < until:
        for _ in range(3):
            answer = requests.post(f"{gateway.url}/api/submit", json={"prompt": "x"}, headers=headers, timeout=10)
            assert answer.status_code == 202
        await_final(broker, [answer.json()["task_id"]])
        unseen = [expression for expression in unseen if not watching.finds(expression)]
    return Seen(url, requests.get(f"{gateway.url}/metrics", headers=headers, timeout=10).text)


@pytest.mark.parametrize(("title", "target"), QUERIES, ids=[f"{title}-{target['refId']}" for title, target in QUERIES])
def test_a_query_finds_something(seen: Seen, title: str, target: dict[str, Any]) -> None:
    expression = filled(target["expr"])
    wants = wanted(expression)
    assert wants
    for want in wants:
        assert seen.has(want), f"{title}: /metrics has no {want.name} with {sorted(want.labels)}"
        legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert legend <= want.labels
    assert seen.finds(expression), f"{title}: nothing, or only NaN"


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_asks_for_what_there_is(seen: Seen, rule: dict[str, Any]) -> None:
    for want in wanted(rule["expr"]):
        assert seen.has(want), f"/metrics has no {want.name} with {sorted(want.labels)}"
    assert seen.ask(rule["expr"]) == [], "and this fleet is well"


@pytest.mark.parametrize("query", SCALING)
def test_an_autoscaler_asks_for_what_there_is(seen: Seen, query: str) -> None:
    assert all(seen.has(want) for want in wanted(query)) and seen.finds(query)


def test_a_name_that_is_wrong_is_found_out(seen: Seen) -> None:
    assert not seen.has(Wanted("zfleet_queue_task", frozenset()))
    assert not seen.has(Wanted("zfleet_queue_tasks", frozenset({"tenant"})))
    assert seen.has(Wanted("zfleet_queue_tasks", frozenset({"model", "priority"})))

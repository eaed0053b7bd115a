"""deploy/kubernetes: every object fits Kubernetes' own schema, and they fit each other and the programs they run.

There is no cluster here. KEDA's one object is held against a schema of our own, of the fields that are used, as no
package for Python has KEDA's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import redis
import requests
import yaml
from redis.backoff import NoBackoff
from redis.retry import Retry

from common.broker import Broker
from common.settings import Settings, load_settings
from gateway.app import create_app
from tests.deploy.pods import (
    FOLDER,
    WORKLOADS,
    as_in_a_pod,
    built,
    container,
    exec_inside,
    first_process,
    of_kind,
    pod,
    variables,
)
from tests.fleet import await_running, ready_workers, record, submit_many
from tests.integration.hardened import answers
from tests.servers import GatewayServer, RedisServer, WorkerServer, binary, eventually
from tests.tenants import bearer, new_key
from worker.supervisor import KILL_MARGIN_S
from zfleet.cli import group

Objects = Sequence[Mapping[str, Any]]
VERSION = "1.32"  # of Kubernetes
NOT_OURS = {"HF_HOME", "HOME", "OTEL_EXPORTER_OTLP_ENDPOINT"}
COMPONENTS = {"gateway", "webhooks", "worker", "redis"}
DOCS = (FOLDER.parents[1] / "docs" / "kubernetes.md").read_text("utf-8")
KEDA_SCHEMA = yaml.safe_load(Path(__file__).with_name("scaledobject.schema.yaml").read_text("utf-8"))


@pytest.fixture(scope="module", params=["base", "own"])
def objects(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Objects:
    """What is applied: the base, and the overlay of docs/kubernetes.md upon that for GPUs, with all components."""
    if request.param == "base":
        return built(FOLDER / "base")
    own = tmp_path_factory.mktemp("own")
    (shown,) = re.findall(r"(?:^    .*\n|^\n)+", DOCS[DOCS.index("    # kustomization.yaml") :], re.MULTILINE)[:1]
    placed = textwrap.dedent(shown).replace("../zfleet/deploy/kubernetes", os.path.relpath(FOLDER, own))
    (own / "kustomization.yaml").write_text(placed, "utf-8")
    return built(own)


def settings_of(objects: Objects, workload: Mapping[str, Any]) -> Settings:
    """The settings that its container reads."""
    told = {name.removeprefix("ZFLEET_").lower(): value for name, value in variables(objects, workload).items()
            if name.startswith("ZFLEET_")}  # fmt: skip
    assert told.keys() <= Settings.model_fields.keys(), "a variable that is no setting"
    return load_settings(told | {"redis_url": "redis://zfleet-redis:6379/0"})


def workload(objects: Objects, component: str) -> Mapping[str, Any]:
    (found,) = (one for one in of_kind(objects, *WORKLOADS) if one["metadata"]["name"] == f"zfleet-{component}")
    return found


# Each object


def test_every_object_fits_its_schema(objects: Objects) -> None:
    assert len(objects) >= 18
    for one in objects:
        assert one["kind"] == "Namespace" or one["metadata"]["namespace"] == "zfleet"
        if one["kind"] == "ScaledObject":
            jsonschema.validate(one, KEDA_SCHEMA)
        else:
            kubernetes_validate.validate(one, VERSION, strict=True)


def test_a_mistake_would_be_found(objects: Objects) -> None:
    broken = json.loads(json.dumps(workload(objects, "worker")))
    broken["spec"]["template"]["spec"]["terminationGracePeriod"] = 100
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, VERSION, strict=True)


def test_pods_may_do_nothing_but_their_work(objects: Objects) -> None:
    for one in of_kind(objects, *WORKLOADS):
        whole, own = pod(one), container(one)
        assert whole["automountServiceAccountToken"] is False
        assert whole["enableServiceLinks"] is False, "a Service called zfleet-x would set ZFLEET_X_PORT"
        assert whole["securityContext"]["runAsNonRoot"] and whole["securityContext"]["runAsUser"] > 0
        assert whole["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert own["securityContext"] == {
            "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
        }  # fmt: skip
        assert own["resources"]["requests"].keys() >= {"cpu", "memory"} and "memory" in own["resources"]["limits"]
        assert "livenessProbe" in own and "startupProbe" in own
    (namespace,) = of_kind(objects, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_the_gpu_overlay_gives_each_worker_a_gpu_and_names_no_registry() -> None:
    objects = built(FOLDER / "overlays" / "gpu")
    worker = workload(objects, "worker")
    images = {container(one)["image"] for one in of_kind(objects, *WORKLOADS)}
    assert images == {"zfleet-gateway", "zfleet-worker", "redis:7.4"}
    assert container(worker)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert settings_of(objects, worker).devices == "all"
    assert settings_of(objects, workload(objects, "gateway")).models == ("turbo",)


def test_an_overlay_of_ones_own_prevails(objects: Objects) -> None:
    gateway, worker = workload(objects, "gateway"), workload(objects, "worker")
    ingress = [one["spec"] for one in of_kind(objects, "Ingress")]
    claims = {one["metadata"]["name"] for one in of_kind(objects, "PersistentVolumeClaim")}
    if not ingress:
        assert claims == {"zfleet-results"}
        return
    assert claims == {"zfleet-models"}, "results are in the bucket"
    settings = settings_of(objects, gateway)
    assert (settings.storage, settings.s3_url) == ("s3", "s3://pictures/zfleet")
    assert (settings.public_url, settings.models) == ("https://pictures.example", ("turbo",))
    assert ingress[0]["ingressClassName"] == "yours" and ingress[0]["rules"][0]["host"] == "pictures.example"
    assert container(worker)["image"] == "registry.example/zfleet-worker:1"
    for name in ("zfleet-s3", "zfleet-traces"):
        assert all(
            {"secretRef": {"name": name, "optional": True}} in container(one)["envFrom"] for one in (gateway, worker)
        )
    assert variables(objects, worker)["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://collector.monitoring:4318"
    (collector,) = [
        one["spec"] for one in of_kind(objects, "NetworkPolicy") if one["metadata"]["name"] == "to-collector"
    ]
    assert collector["egress"] == [{"ports": [{"protocol": "TCP", "port": 4318}]}]


# Against each other


def test_whatever_selects_finds_pods(objects: Objects) -> None:
    labels = {
        one["metadata"]["name"]: one["spec"]["template"]["metadata"]["labels"] for one in of_kind(objects, *WORKLOADS)
    }
    assert {found["app.kubernetes.io/component"] for found in labels.values()} == COMPONENTS
    for one in of_kind(objects, *WORKLOADS):
        assert one["spec"]["selector"]["matchLabels"].items() <= labels[one["metadata"]["name"]].items()
    for one in of_kind(objects, "Service", "PodDisruptionBudget", "NetworkPolicy"):
        spec = one["spec"]
        for selector in [spec.get("selector"), spec.get("podSelector"), *_pods_named(spec)]:
            if selector:
                chosen = [name for name, found in labels.items() if _matches(selector, found)]
                assert chosen, f"{one['metadata']['name']} selects nobody"
    for one in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject"):
        scaled = workload(objects, one["spec"]["scaleTargetRef"]["name"].removeprefix("zfleet-"))
        assert "replicas" not in scaled["spec"], "each apply would undo what the autoscaler did"


def _pods_named(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    peers = [peer for rule in spec.get("ingress", ()) for peer in rule.get("from", ())]
    peers += [peer for rule in spec.get("egress", ()) for peer in rule.get("to", ())]
    return [peer["podSelector"] for peer in peers if "podSelector" in peer]


def _matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    plain = selector.get("matchLabels", {} if "matchExpressions" in selector else selector)
    among = selector.get("matchExpressions", ())
    return plain.items() <= labels.items() and all(labels.get(one["key"]) in one["values"] for one in among)


def test_ports_are_those_that_programs_listen_on(objects: Objects) -> None:
    ports = {
        one["metadata"]["name"]: {port["name"]: port["containerPort"] for port in container(one).get("ports", ())}
        for one in of_kind(objects, *WORKLOADS)
    }
    gateway = settings_of(objects, workload(objects, "gateway"))
    assert ports["zfleet-gateway"] == {"http": gateway.port} and gateway.host == "0.0.0.0"
    assert ports["zfleet-redis"] == {"redis": 6379}
    known = {name for of_one in ports.values() for name in of_one}
    for one in of_kind(objects, "Service"):
        assert {port["targetPort"] for port in one["spec"]["ports"]} == set(ports[one["metadata"]["name"]])
    for one in of_kind(objects, "NetworkPolicy"):
        rules = [*one["spec"].get("ingress", ()), *one["spec"].get("egress", ())]
        named = {port["port"] for rule in rules for port in rule.get("ports", ()) if isinstance(port["port"], str)}
        assert named <= known
    for one in of_kind(objects, "Ingress"):
        (path,) = one["spec"]["rules"][0]["http"]["paths"]
        assert path["backend"]["service"] == {"name": "zfleet-gateway", "port": {"name": "http"}}


def test_only_the_fleet_reaches_redis_and_nobody_anything_that_is_not_said(objects: Objects) -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind(objects, "NetworkPolicy")}
    assert policies["nobody"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    (rule,) = policies["redis"]["ingress"]
    (peer,) = rule["from"]
    assert set(peer["podSelector"]["matchExpressions"][0]["values"]) == COMPONENTS - {"redis"}
    to_redis = {"app.kubernetes.io/component": "redis"}
    open_to_redis = [
        name for name, spec in policies.items() if "ingress" in spec and _matches(spec["podSelector"], to_redis)
    ]
    assert open_to_redis == ["redis"]


def test_every_reference_is_to_something_there(objects: Objects) -> None:
    there = {(one["kind"], one["metadata"]["name"]) for one in objects}
    secrets = set(_secret()["stringData"])
    for one in of_kind(objects, *WORKLOADS):
        for volume in pod(one).get("volumes", ()):
            if claim := volume.get("persistentVolumeClaim"):
                assert ("PersistentVolumeClaim", claim["claimName"]) in there
            if files := volume.get("configMap"):
                assert ("ConfigMap", files["name"]) in there
            assert {item["key"] for item in volume.get("secret", {}).get("items", ())} <= secrets
        for variable in container(one).get("env", ()):
            if "valueFrom" in variable:
                reference = variable["valueFrom"]["secretKeyRef"]
                assert reference["name"] == "zfleet-redis" and reference["key"] in secrets
        mounted = {volume["name"] for volume in container(one)["volumeMounts"]}
        assert mounted <= {volume["name"] for volume in pod(one).get("volumes", ())} | {"data"}


# Against the programs


def test_every_variable_is_a_setting(objects: Objects) -> None:
    for one in of_kind(objects, "Deployment"):
        settings = settings_of(objects, one)
        others = {name for name in variables(objects, one) if not name.startswith("ZFLEET_")}
        assert others <= NOT_OURS
        writable = {volume["mountPath"] for volume in container(one)["volumeMounts"]}
        assert str(settings.alive_file.parent) in writable if settings.alive_file else False
        if one["metadata"]["name"] != "zfleet-webhooks":
            assert str(settings.data_dir) in writable


def test_probes_ask_for_what_there_is(objects: Objects, settings: Settings) -> None:
    routes = {str(rule) for rule in create_app(settings).url_map.iter_rules()}
    for one in of_kind(objects, "Deployment"):
        own = container(one)
        for probe in (own["startupProbe"], own["livenessProbe"], own.get("readinessProbe", own["livenessProbe"])):
            if "httpGet" in probe:
                assert probe["httpGet"]["path"] in routes and probe["httpGet"]["port"] == "http"
            else:
                _is_a_command(probe["exec"]["command"])
        _is_a_command(own["command"])
    gateway, worker = (container(workload(objects, name)) for name in ("gateway", "worker"))
    assert gateway["livenessProbe"]["httpGet"]["path"] == "/live", "that asks nobody"
    assert gateway["readinessProbe"]["httpGet"]["path"] == "/health", (
        "/ready would close the door while no worker lives"
    )
    assert gateway["readinessProbe"]["timeoutSeconds"] > settings.redis_patience_s
    patience_s = worker["startupProbe"]["periodSeconds"] * worker["startupProbe"]["failureThreshold"]
    assert patience_s > settings_of(objects, workload(objects, "worker")).load_limit_s


def _is_a_command(command: Sequence[str]) -> None:
    program, name, *options = command
    assert program == "zfleet" and name in group.commands
    known = {option for parameter in group.commands[name].params for option in parameter.opts}
    assert set(options) <= known


def test_there_is_time_to_end_well(objects: Objects) -> None:
    worker, gateway = workload(objects, "worker"), workload(objects, "gateway")
    drain_s = settings_of(objects, worker).drain_s
    assert pod(worker)["terminationGracePeriodSeconds"] >= drain_s + KILL_MARGIN_S + 20
    (_, wait_s) = container(gateway)["lifecycle"]["preStop"]["exec"]["command"]
    conf = (FOLDER.parents[1] / "gateway" / "gunicorn_conf.py").read_text("utf-8")
    under_way = re.search(r"^graceful_timeout = (\d+)", conf, re.MULTILINE)
    assert under_way
    assert pod(gateway)["terminationGracePeriodSeconds"] >= int(wait_s) + int(under_way[1]) + 10


def test_busy_workers_are_never_why_a_fleet_shrinks(tmp_path: Path) -> None:
    """What the triggers ask for with three workers at work and nothing in line, as two gateways tell of it."""
    (scaling,) = of_kind(built(FOLDER / "overlays" / "gpu"), "ScaledObject")
    asked = {trigger["name"]: trigger["metadata"]["query"] for trigger in scaling["spec"]["triggers"]}
    series = [
        {"series": f'{name}{{instance="{gateway}"{labels}}}', "values": str(value)}
        for gateway in "ab"
        for name, labels, value in (
            ("zfleet_queue_tasks", ', model="turbo", priority="normal"', 4),
            ("zfleet_queue_tasks", ', model="base", priority="low"', 1),
            ("zfleet_running_tasks", ', model="turbo"', 3),
            ("zfleet_workers", ', state="busy"', 3),
            ("zfleet_workers", ', state="idle"', 2),
            ("zfleet_workers", ', state="draining"', 1),
        )
    ]
    expected = {"tasks": 4 + 1 + 3, "busy": 3}
    cases = [{"expr": asked[name], "eval_time": "0m", "exp_samples": [{"labels": "{}", "value": expected[name]}]}
             for name in expected]  # fmt: skip
    nothing = [{"expr": query, "eval_time": "0m", "exp_samples": []} for query in asked.values()]
    tests = [
        {"interval": "1m", "input_series": series, "promql_expr_test": cases},
        {"interval": "1m", "input_series": [], "promql_expr_test": nothing},
    ]
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"tests": tests}), "utf-8")
    command = [binary("promtool"), "test", "rules", "test.yml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# Run


def _secret() -> Any:
    command = [sys.executable, str(FOLDER / "passwords.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_redis_starts_with_these_passwords_and_no_other_opens_it(tmp_path: Path) -> None:
    secret = _secret()
    kubernetes_validate.validate(secret, VERSION, strict=True)
    told = secret["stringData"]
    assert told["worker-url"] != _secret()["stringData"]["worker-url"]
    assert "PASSWORD" not in told["users.acl"]
    (tmp_path / "users.acl").write_text(told["users.acl"], "utf-8")
    conf = (FOLDER / "base" / "redis.conf").read_text("utf-8")
    conf = conf.replace("dir /data", f"dir {tmp_path}").replace("/etc/redis/users.acl", f"{tmp_path}/users.acl")
    (tmp_path / "redis.conf").write_text(conf, "utf-8")
    server = RedisServer(tmp_path)
    server.command = [binary("redis-server"), f"{tmp_path}/redis.conf", "--port", str(server.port)]
    worker = told["worker-url"].replace("zfleet-redis:6379", f"127.0.0.1:{server.port}")
    server.client = redis.Redis.from_url(worker, decode_responses=True)
    with server:
        for part in ("gateway", "worker", "courier", "operator"):
            url = told[f"{part}-url"].replace("zfleet-redis:6379", f"127.0.0.1:{server.port}")
            found = redis.Redis.from_url(url, decode_responses=True).info()
            assert (found["aof_enabled"], found["maxmemory_policy"]) == (1, "noeviction")
            password = url.partition("@")[0].rpartition(":")[2]
            assert hashlib.sha256(password.encode()).hexdigest() in told["users.acl"]
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=server.port, retry=Retry(NoBackoff(), 0)).ping()


def test_pods_start_on_a_read_only_disk_and_the_hook_drains_a_worker(
    settings: Settings, broker: Broker, tmp_path: Path
) -> None:
    base = built(FOLDER / "base")
    key = bearer(new_key(broker))
    (temporary := tmp_path / "tmp").mkdir()
    settings = settings.model_copy(update={"simulated_image_ms": 1000.0, "models": ("simulated",)})
    worker = as_in_a_pod(WorkerServer(settings, tmp_path / "worker.log"), tmp_path)
    gateway = as_in_a_pod(GatewayServer(settings, tmp_path / "gateway.log"), tmp_path)
    for server in (worker, gateway):
        assert server.env
        server.env |= {"TMPDIR": str(temporary), "HOME": str(temporary), "PYTHONDONTWRITEBYTECODE": "1"}
    with worker, gateway:
        ready_workers(broker)
        eventually(lambda: answers(gateway.url), within_s=30)
        answer = requests.post(f"{gateway.url}/api/submit", json={"prompt": "x"}, headers=key, timeout=10)
        (late,) = submit_many(broker, 1)
        task_id = answer.json()["task_id"]
        await_running(broker, [task_id])
        exec_inside(worker, container(workload(base, "worker"))["lifecycle"]["preStop"]["exec"]["command"])
        assert worker.process and worker.process.wait(10) == 0
        status = requests.get(f"{gateway.url}/api/status/{task_id}", headers=key, timeout=10).json()
        assert (status["status"], len(status["attempts"])) == ("succeeded", 1), "what had begun was finished"
        assert requests.get(gateway.url + status["images"][0]["url"], headers=key, timeout=10).ok
        assert record(broker, late).status in ("queued", "succeeded")
        os.kill(first_process(gateway), 15)
        assert gateway.process and gateway.process.wait(40) == 0

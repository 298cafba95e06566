"""docker/ in step with the code: no engine is at hand, so the files are read, not run."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from django.core.management import get_commands

from llmsite.config import Config, load
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.unit

DOCKER = REPOSITORY / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = ("setup", "web", "worker", "beat")
DOCKERFILE = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
FOREIGN_VARIABLES = {"PATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "DJANGO_SETTINGS_MODULE"}


def stage(name: str) -> str:
    """The lines of one stage of the Dockerfile."""
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    (found,) = [text for text in stages if re.match(rf"\S+ AS {name}\n", text)]
    return found


def dockerfile_environment(text: str) -> dict[str, str]:
    lines = [line.removeprefix("ENV ") for line in text.splitlines() if line.startswith("ENV ")]
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(lines)))


def command_of(service: str) -> list[str]:
    if "command" in SERVICES[service]:
        return [str(word) for word in SERVICES[service]["command"]]
    (found,) = re.findall(r"^CMD (\[.*\])$", stage(SERVICES[service]["build"]["target"]), flags=re.MULTILINE)
    return [str(word) for word in json.loads(found)]


def test_every_service_that_was_promised_is_there() -> None:
    expected = {"postgres", "redis", "web", "worker", "beat", "prometheus", "grafana", "setup"}
    assert set(SERVICES) == expected


def test_no_service_is_left_without_a_health_check() -> None:
    for name, service in SERVICES.items():
        if service.get("healthcheck", {}).get("disable"):
            assert name in {"setup", "beat"}
        elif name in OURS:
            assert "HEALTHCHECK" in stage(service["build"]["target"])
        else:
            assert service["healthcheck"]["test"][0] == "CMD"


@pytest.mark.parametrize("service", OURS)
def test_environment_variables_are_settings(service: str) -> None:
    settings = {name.upper() for name in Config.model_fields}
    given = set(SERVICES[service]["environment"])
    assert given <= settings
    assert {"DATABASE_URL", "REDIS_URL", "SECRET_KEY", "KEY_PEPPER"} <= given
    for name in ("site", "web", "worker"):
        assert dockerfile_environment(stage(name)).keys() - FOREIGN_VARIABLES <= settings


def test_the_environment_of_the_containers_describes_a_server_that_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"POSTGRES_PASSWORD": "p", "REDIS_PASSWORD": "r", "SECRET_KEY": "s" * 50, "KEY_PEPPER": f"1:{'k' * 50}"}

    def fill(text: str) -> str:
        text = re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: found.group(2), text)
        return re.sub(r"\$\{(\w+)[^}]*\}", lambda found: secrets[found.group(1)], text)

    for service in OURS:
        for name, value in SERVICES[service]["environment"].items():
            monkeypatch.setenv(name, fill(str(value)))
        config = load()
        assert config.redis() == "redis://:r@redis:6379/0"
        assert config.database_url == "postgres://llmsite:p@postgres:5432/llmsite"
        assert "*" not in config.allowed_hosts


@pytest.mark.parametrize("service", OURS)
def test_commands_exist(service: str) -> None:
    command = command_of(service)
    assert command[0] == "python"
    if command[1] == "-m":
        assert importlib.util.find_spec(command[2]) is not None
    else:
        assert command[1] == "manage.py"
        assert command[2] in get_commands()


def test_commands_in_the_readme_exist() -> None:
    text = (DOCKER / "README.md").read_text()
    commands = set(re.findall(r"manage\.py (\w+)", text))
    assert commands == {"register_model", "createsuperuser"}
    assert commands <= set(get_commands())
    assert "have not been run" in text


def test_the_ports_are_the_same_everywhere() -> None:
    web = SERVICES["web"]
    assert web["environment"]["PORT"] == "8000"
    assert web["ports"] == ["127.0.0.1:${PORT:-8000}:8000"]
    assert "EXPOSE 8000" in stage("web")
    assert "127.0.0.1:8000/healthz" in stage("web")
    metrics_port = SERVICES["worker"]["environment"]["WORKER_METRICS_PORT"]
    assert f"EXPOSE {metrics_port}" in stage("worker")
    assert f"127.0.0.1:{metrics_port}/metrics" in stage("worker")
    jobs = {job["job_name"]: job for job in yaml.safe_load((DOCKER / "prometheus.yml").read_text())["scrape_configs"]}
    assert jobs["web"]["static_configs"][0]["targets"] == ["web:8000"]
    assert jobs["worker"]["dns_sd_configs"][0] == {"names": ["worker"], "type": "A", "port": int(metrics_port)}


def test_every_published_port_is_on_loopback() -> None:
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@pytest.mark.parametrize("service", OURS)
def test_our_containers_have_few_rights(service: str) -> None:
    plan = SERVICES[service]
    assert plan["read_only"] is True
    assert plan["cap_drop"] == ["ALL"]
    assert plan["security_opt"] == ["no-new-privileges:true"]
    assert "USER llmsite" in stage("site")
    assert all(mount.split(":")[0] in {"state", "${MODELS_DIR"} for mount in plan["volumes"])


def test_who_depends_on_whom_exists() -> None:
    for service in SERVICES.values():
        assert set(service.get("depends_on", {})) <= set(SERVICES)
    for mount in (mount for service in SERVICES.values() for mount in service.get("volumes", [])):
        source = mount.split(":")[0]
        if source.startswith("./"):
            assert (DOCKER / source).exists(), mount
        elif not source.startswith("$"):
            assert source in COMPOSE["volumes"], mount


def test_redis_keeps_what_waits() -> None:
    command = SERVICES["redis"]["command"]
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"
    assert command[command.index("--appendonly") + 1] == "yes"


def test_the_example_of_the_secrets_names_each() -> None:
    required = set(re.findall(r"\$\{(\w+):\?", (DOCKER / "compose.yaml").read_text()))
    named = set(re.findall(r"^(\w+)=", (DOCKER / ".env.example").read_text(), flags=re.MULTILINE))
    assert required <= named
    optional = set(re.findall(r"\$\{(\w+):-", (DOCKER / "compose.yaml").read_text()))
    assert optional <= named | {name.upper() for name in Config.model_fields}


def test_what_the_images_copy_exists() -> None:
    for line in DOCKERFILE.splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            *sources, _ = line.removeprefix("COPY ").split()
            assert all((REPOSITORY / source).exists() for source in sources), line


def test_the_images_are_compiled_for_other_processors_than_the_builders() -> None:
    assert "-DGGML_NATIVE=OFF" in stage("build")
    assert "--require-hashes" in stage("build")


def metric_names() -> set[str]:
    """Every name that our metrics have on the page, with the suffixes of histograms and counters."""
    from prometheus_client import REGISTRY

    import inference.metrics  # noqa: F401 - registers itself

    names: set[str] = set()
    for family in REGISTRY.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        names |= {family.name + suffix for suffix in suffixes}
    return names


def test_the_dashboard_asks_for_metrics_that_exist_and_shows_all_of_ours() -> None:
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "llmsite.json").read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\bllm_\w+", target["expr"])
    }
    known = metric_names()
    assert asked <= known
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    ours = {re.sub(r"_(bucket|sum|count)$", "", name) for name in known if name.startswith("llm_")}
    assert ours - shown <= {"llm_redis_enabled", "llm_batch_size"}


def test_grafana_finds_the_datasource_and_the_dashboard() -> None:
    provisioning = DOCKER / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "llmsite.json").read_text())
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "llmsite.yaml").read_text())["providers"]
    mounts = {mount.split(":")[1]: Path(mount.split(":")[0]).name for mount in SERVICES["grafana"]["volumes"]}
    assert mounts[provider["options"]["path"]] == "dashboards"

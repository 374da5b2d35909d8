"""What stands in deploy/ exists here: options, ports, probes, metrics, files; linters run where they are installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from running_server import StartServer

from megatron_medha.options.compose import compose, freeze
from megatron_medha.options.serve_options import ServeOptions
from megatron_medha.server.routes.auth import OPEN_PATHS, PROBE_PATHS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
ATTACH_PORT = 5570


def documents(path: Path) -> list[dict[str, Any]]:
    return [*yaml.safe_load_all(path.read_text("utf-8"))]


def inside(value: Any, key: str) -> Iterator[Any]:
    """Every value of that key, however deep."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == key:
                yield inner
            yield from inside(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from inside(inner, key)


def pods() -> Iterator[dict[str, Any]]:
    for path in MANIFESTS:
        for document in documents(path):
            for spec in inside(document, "spec"):
                if "containers" in spec:
                    yield spec


def unit() -> dict[str, str]:
    lines = (DEPLOY / "medha.service").read_text("utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every `medha serve` of the folder, by where it stands."""
    for path in MANIFESTS:
        for args in inside(documents(path), "args"):
            yield path.name, args
    yield "compose.yaml", documents(DEPLOY / "compose.yaml")[0]["services"]["server"]["command"]
    yield "medha.service", [word for word in unit()["ExecStart"].split()[1:] if word != "$MEDHA_OPTIONS"]
    for words in re.findall(r"^CMD (\[\"serve.*)$", (DEPLOY / "Dockerfile").read_text("utf-8"), re.MULTILINE):
        yield "Dockerfile", json.loads(words)


def options_of(words: list[str]) -> ServeOptions:
    assert words[0] == "serve"
    words = [word.replace("${MEDHA_CHECKPOINT}", "/models/model") for word in words[1:]]
    return freeze(compose("serve", ServeOptions, words), ServeOptions)


@pytest.fixture(autouse=True)
def api_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDHA_API_KEY", "a-key")


def test_every_server_s_options_compose_and_it_can_be_reached_with_a_key_only() -> None:
    found = [*commands()]
    assert {where for where, _ in found} == {
        "deployment.yaml", "leader_worker_set.yaml", "compose.yaml", "medha.service", "Dockerfile",
    }  # fmt: skip
    for where, words in found:
        options = options_of(words)
        assert options.server.host == "0.0.0.0" and options.server.api_key == "a-key", where


def test_ports_and_probes_are_those_of_the_server() -> None:
    port = options_of(["serve"]).server.port
    for spec in pods():
        for container in spec["containers"]:
            named = {each["name"]: each["containerPort"] for each in container.get("ports", ())}
            assert named.items() <= {"http": port, "ranks": ATTACH_PORT}.items()
            for probe in ("livenessProbe", "startupProbe", "readinessProbe"):
                if "http" in named:
                    assert container[probe]["httpGet"]["port"] == "http"
                    assert container[probe]["httpGet"]["path"] in PROBE_PATHS
    for text in ((DEPLOY / "Dockerfile").read_text("utf-8"), (DEPLOY / "compose.yaml").read_text("utf-8")):
        assert f"EXPOSE {port}" in text or f":{port}:{port}" in text
    assert set(re.findall(r"127\.0\.0\.1:8000(/\w+)", (DEPLOY / "Dockerfile").read_text("utf-8"))) <= OPEN_PATHS
    (scrape,) = documents(DEPLOY / "prometheus" / "prometheus.yaml")[0]["scrape_configs"]
    assert scrape["static_configs"][0]["targets"] == [f"server:{port}"]
    assert scrape["metrics_path"] == "/metrics"


def test_ranks_of_several_hosts_attach_where_their_server_listens() -> None:
    (group,) = (one for path in MANIFESTS for one in documents(path) if one["kind"] == "LeaderWorkerSet")
    (args,) = inside(group, "args")
    options = options_of(args)
    assert options.launch.address is not None and options.launch.address.endswith(f":{ATTACH_PORT}")
    agents = [command for command in inside(group, "command") if "torchrun" in command]
    assert len(agents) == 2 and agents[0] == agents[1]
    assert f"tcp://$(LWS_LEADER_ADDRESS):{ATTACH_PORT}" in agents[0]
    assert str(options.launch.key_file) in agents[0]
    (per_host,) = {int(number) for number in re.findall(r"--nproc-per-node=(\d+)", " ".join(agents[0]))}
    assert group["spec"]["leaderWorkerTemplate"]["size"] * per_host == options.parallel.world_size


def test_running_requests_may_end_before_the_process_is_killed() -> None:
    for spec in pods():
        for container in spec["containers"]:
            if "args" in container:
                drain_s = options_of(container["args"]).server.drain_timeout_s
                wait_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
                assert spec["terminationGracePeriodSeconds"] >= drain_s + wait_s + 10
    server = documents(DEPLOY / "compose.yaml")[0]["services"]["server"]
    grace_s = int(server["stop_grace_period"].removesuffix("s"))
    assert grace_s >= options_of(server["command"]).server.drain_timeout_s + 10
    words = [word for where, words in commands() if where == "medha.service" for word in words]
    assert int(unit()["TimeoutStopSec"]) >= options_of(words).server.drain_timeout_s + 10


def test_alerts_are_about_metrics_that_the_server_has(start_server: StartServer) -> None:
    page = start_server().get("/metrics").text
    known = {name.removesuffix("_total") for name in re.findall(r"^# TYPE (medha:\w+)", page, re.MULTILINE)}
    (groups,) = documents(DEPLOY / "prometheus" / "alerts.yaml")
    rules = groups["groups"][0]["rules"]
    asked = {name.removesuffix("_total") for rule in rules for name in re.findall(r"medha:\w+", rule["expr"])}
    assert len(asked) > 6 and asked <= known, asked - known
    described = (ROOT / "docs" / "deploy.md").read_text("utf-8")
    for rule in rules:
        assert f"`{rule['alert']}`" in described
        assert rule["annotations"].keys() == {"summary", "description"}


def test_files_that_are_mounted_or_copied_are_there() -> None:
    services = documents(DEPLOY / "compose.yaml")[0]["services"]
    mounted = [volume.split(":")[0] for each in services.values() for volume in each.get("volumes", ())]
    files = [path for path in mounted if path.startswith(".")]
    assert len(files) == 5
    assert all((DEPLOY / path).is_file() for path in files)
    build = services["server"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).samefile(DEPLOY / "Dockerfile")
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8")
    shown = re.findall(r"^!(\S+)", ignored, re.MULTILINE)
    assert {"megatron_medha", "kernels", "conf", "setup.py", "pyproject.toml", "README.md"} <= set(shown)
    board = documents(DEPLOY / "grafana" / "dashboards.yaml")[0]["providers"][0]["options"]["path"]
    assert any(volume.split(":")[1].startswith(board) for volume in services["grafana"]["volumes"])


def test_the_image_has_both_targets_and_versions_that_the_package_allows() -> None:
    text = (DEPLOY / "Dockerfile").read_text("utf-8")
    assert {"cpu", "cuda"} <= set(re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE))
    known = {
        "FROM", "RUN", "COPY", "ENV", "USER", "WORKDIR", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT",
        "CMD",
    }  # fmt: skip
    lines = [line for line in re.sub(r"\\\n", " ", text).splitlines() if line and not line.startswith("#")]
    assert {line.split()[0] for line in lines} <= known
    for stage in re.split(r"^FROM ", text, flags=re.MULTILINE)[2:]:
        # Nobody runs it as root, and it is told to end by the signal that drains.
        assert re.findall(r"^USER (\w+)$", stage, re.MULTILINE) == ["medha"]
        assert "STOPSIGNAL SIGTERM" in stage and "HEALTHCHECK" in stage


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    path = tmp_path / "medha.service"
    text = (DEPLOY / "medha.service").read_text("utf-8")
    path.write_text(text.replace("/opt/medha/bin/medha", shutil.which("true") or "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    about = [line for line in done.stderr.splitlines() if "medha" in line]
    assert about == [], done.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
@pytest.mark.parametrize("words", [("config", "--syntax-only", "prometheus.yaml"), ("rules", "alerts.yaml")])
def test_prometheus_accepts_configuration_and_rules(words: tuple[str, ...]) -> None:
    command = ["promtool", "check", *words]
    done = subprocess.run(
        command, cwd=DEPLOY / "prometheus", capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

"""The container's files: commands, flags, paths, ports and metrics in them are those of this version."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import httpx
import pytest
import tyro
import yaml

from tenure.scripts.serve import ServeConfig
from tenure.serving.server import ServerConfig

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
DOCKERFILE = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
pytestmark = pytest.mark.skipif(not DEPLOY.is_dir(), reason="needs a checkout")


def instructions(name: str) -> list[str]:
    """The arguments of each instruction of that name, in order."""
    return re.findall(rf"^{name}\s+(.*)$", DOCKERFILE, re.MULTILINE)


def document(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def serve_config(arguments: list[str]) -> ServeConfig:
    """The config of the container's command line with these arguments behind the entry point."""
    entry = json.loads(instructions("ENTRYPOINT")[0])
    assert entry[:2] == ["tenure", "serve"], "without a shell, which would keep SIGTERM to itself"
    return tyro.cli(ServeConfig, args=[*entry[2:], *arguments])


def test_the_command_line_is_one_of_this_version():
    config = serve_config(json.loads(instructions("CMD")[-1]))
    assert config.host == "0.0.0.0" and config.port == int(instructions("EXPOSE")[0])
    folder, _ = config.disk_tier or (None, 0)
    assert folder is not None and folder.is_relative_to(instructions("VOLUME")[0])


def test_the_server_runs_as_nobody_special_and_drains_on_sigterm():
    users = [line for line in DOCKERFILE.splitlines() if line.startswith(("USER", "ENTRYPOINT"))]
    assert users[0] == "USER 10001:10001" and instructions("STOPSIGNAL") == ["SIGTERM"]


def test_what_is_copied_exists_and_is_not_ignored():
    patterns = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    kept = {line[1:] for line in patterns if line.startswith("!")}
    copied = [arg for line in instructions("COPY") if "--from" not in line for arg in line.split()[:-1]]
    assert "constraints.txt" in copied and set(copied) == kept
    assert all((ROOT / name).exists() for name in copied)
    packages = ConfigParser()
    packages.read(ROOT / "setup.cfg")
    folders = {name.split(".")[1] for name in packages["options"]["packages"].split() if "." in name}
    assert {*folders, "tenure"} <= set(copied)
    extras = re.findall(r"\.\[([\w,]+)\]", DOCKERFILE)[0].split(",")
    assert set(extras) <= set(packages["options.extras_require"])


def test_the_health_check_passes_on_a_server_and_fails_without_one(served):
    check = json.loads(DOCKERFILE.split("HEALTHCHECK")[1].split("CMD", 1)[1].splitlines()[0])
    assert check[0] == "python" and f"127.0.0.1:{instructions('EXPOSE')[0]}/health" in check[2]
    code = check[2].replace("http://127.0.0.1:8000", served.root)
    assert subprocess.run([sys.executable, *check[1:-1], code], capture_output=True).returncode == 0
    served.stop()
    assert subprocess.run([sys.executable, *check[1:-1], code], capture_output=True).returncode == 1


def test_the_services_fit_together():
    compose = document("compose.yaml")
    tenure, prometheus = compose["services"]["tenure"], compose["services"]["prometheus"]
    config = serve_config(tenure["command"])
    assert str(config.api_keys) == "/run/secrets/api_keys" and tenure["secrets"] == ["api_keys"]
    grace_s = int(tenure["stop_grace_period"].removesuffix("s"))
    assert grace_s > config.drain_s + ServerConfig().close_s
    assert (DEPLOY / tenure["build"]["context"]).resolve() == ROOT
    assert (ROOT / tenure["build"]["dockerfile"]).is_file()
    names = {
        service: {mount.split(":")[0] for mount in compose["services"][service]["volumes"]}
        for service in compose["services"]
    }
    volumes = {name for each in names.values() for name in each if not name.startswith("./")}
    assert volumes == set(compose["volumes"])
    assert all((DEPLOY / name).is_file() for each in names.values() for name in each if name.startswith("./"))
    assert {*tenure["secrets"], *prometheus["secrets"]} == set(compose["secrets"])
    assert all(port.startswith("127.0.0.1:") for service in (tenure, prometheus) for port in service["ports"])


def test_prometheus_scrapes_the_server_with_the_admins_key():
    compose, config = document("compose.yaml"), document("prometheus.yaml")
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"tenure:{instructions('EXPOSE')[0]}"]}]
    (secret,) = compose["services"]["prometheus"]["secrets"]
    assert job["authorization"] == {"type": "Bearer", "credentials_file": f"/run/secrets/{secret}"}
    mounted = {mount.split(":")[1] for mount in compose["services"]["prometheus"]["volumes"]}
    assert {*config["rule_files"], "/etc/prometheus/prometheus.yaml"} <= mounted


def test_alerts_name_metrics_that_the_server_has(served):
    served.post(
        "/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    )
    text = httpx.get(f"{served.root}/metrics").text
    known = {re.split(r"[ {]", line)[0] for line in text.splitlines() if line and not line.startswith("#")}
    rules = [rule for group in document("alerts.yaml")["groups"] for rule in group["rules"]]
    asked = {name for rule in rules for name in re.findall(r"tenure_\w+", rule["expr"])}
    assert len(rules) == len({rule["alert"] for rule in rules}) and len(asked) >= 5
    assert asked <= known, asked - known

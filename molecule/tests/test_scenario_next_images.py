"""The same stack by a registry's images: chosen by itself, newer than what Debian has today."""

import pytest
from conftest import Stack
from test_alerts import STOP, Drills


def test_the_registry_was_chosen_by_itself(stack: Stack) -> None:
    assert stack.vars["image_source"] == "auto"
    assert (stack.secrets / "image_source").read_text() == "registry\n"


@pytest.mark.parametrize(
    ("service", "official"),
    [
        ("rabbitmq", "rabbitmq_image"),
        ("fluentd", "fluentd_image"),
        ("prometheus", "monitoring_prometheus_image"),
        ("alertmanager", "monitoring_alertmanager_image"),
    ],
)
def test_an_official_image_runs_by_its_own_name(stack: Stack, service: str, official: str) -> None:
    assert stack.inspect(service)["Config"]["Image"] == stack.vars[official]


@pytest.mark.parametrize("service", ["publisher", "subscriber", "exporter"])
def test_what_is_ours_was_built_on_the_host(stack: Stack, service: str) -> None:
    assert stack.inspect(service)["Config"]["Image"].startswith(f"{stack.name}/{service}:")


def test_broker_and_prometheus_are_the_newer_ones(stack: Stack) -> None:
    broker = stack.api("/overview").json["rabbitmq_version"]
    assert stack.vars["rabbitmq_image"] == f"rabbitmq:{broker}-management"
    prometheus = stack.http("monitoring_prometheus_port", "/api/v1/status/buildinfo").json["data"]
    assert prometheus["version"].startswith("3.")


def test_a_stopped_broker_is_told_and_so_is_its_end(stack: Stack) -> None:
    run = Drills(stack)
    run.cause(STOP)
    run.wait("firing", STOP)
    run.cure(STOP)
    run.wait("resolved", STOP)
    assert STOP.seconds.keys() == {"firing", "resolved"}
    stack.wait_until_ready()

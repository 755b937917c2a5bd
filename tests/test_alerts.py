"""The alerts fire when they must and only then, and go where the route says.

promtool and amtool are those of the images that will read the files.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT, Rendered, render, run_in

CASES = sorted((ROOT / "tests/alerts").glob("*.yml"))
CONFIG = "alertmanager/alertmanager.yml"
TEAM = {
    "name": "team",
    "webhook_configs": [{"url_file": "/etc/alertmanager/secrets/team_url"}],
    "email_configs": [
        {
            "to": "team@example.com",
            "from": "alerts@example.com",
            "smarthost": "mail.example.com:587",
            "auth_username": "alerts",
            "auth_password_file": "/etc/alertmanager/secrets/smtp",
        }
    ],
}
ROUTE = {
    "receiver": "log",
    "group_by": ["alertname"],
    "routes": [
        {"receiver": "team", "matchers": ["severity = high"], "continue": True},
        {"receiver": "log"},
    ],
}


@pytest.fixture(scope="module")
def prometheus(rendered: Rendered) -> dict[str, str]:
    """Return the folder of Prometheus' configuration, path by path."""
    files = {
        name.removeprefix("prometheus/"): text
        for name, text in rendered.first.items()
        if name.startswith("prometheus/")
    }
    plain = ROOT / "roles/monitoring/files/prometheus"
    return files | {str(path.relative_to(plain)): path.read_text() for path in plain.rglob("*.yml")}


@pytest.fixture(scope="module")
def alerts(prometheus: dict[str, str]) -> dict[str, Any]:
    """Return every alerting rule by its name."""
    groups = [
        group
        for path, text in prometheus.items()
        if path.startswith("rules/")
        for group in yaml.safe_load(text)["groups"]
    ]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    return {rule["alert"]: rule for rule in rules}


@pytest.fixture(scope="module")
def with_a_team(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return alertmanager.yml with a receiver of the user's own."""
    folder = tmp_path_factory.mktemp("team")
    own = {"monitoring_alertmanager_receivers": [TEAM], "monitoring_alertmanager_route": ROUTE}
    return render(folder, **own)[CONFIG]


def test_promtool_takes_the_configuration(
    images: dict[str, str], prometheus: dict[str, str]
) -> None:
    done = run_in(images["prometheus"], prometheus, "promtool check config prometheus.yml")
    assert done.returncode == 0, done.stdout
    assert "rule files found" in done.stdout


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_the_rules_do_what_their_cases_say(
    images: dict[str, str], prometheus: dict[str, str], case: Path
) -> None:
    files = {**prometheus, "case.yml": case.read_text()}
    done = run_in(images["prometheus"], files, "promtool test rules case.yml")
    assert done.returncode == 0, done.stdout
    assert "SUCCESS" in done.stdout


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not_yet(
    alerts: dict[str, Any],
) -> None:
    checks = [
        check
        for case in CASES
        for test in yaml.safe_load(case.read_text())["tests"]
        for check in test.get("alert_rule_test", [])
    ]
    fired = {check["alertname"] for check in checks if check.get("exp_alerts")}
    silent = {check["alertname"] for check in checks if not check.get("exp_alerts")}
    assert fired == alerts.keys()
    assert silent == alerts.keys() - {"Watchdog"}


def test_every_alert_says_how_bad_it_is_what_is_wrong_and_where_to_read_on(
    alerts: dict[str, Any],
) -> None:
    sections = re.findall(r"^## (\w+)$", (ROOT / "docs/alerts.md").read_text(), re.MULTILINE)
    assert set(sections) == alerts.keys()
    for name, rule in alerts.items():
        assert rule["labels"].keys() == {"severity"}
        assert rule["labels"]["severity"] in {"high", "low", "none"}
        notes = rule["annotations"]
        assert notes.keys() == {"summary", "description", "runbook_url"}
        assert all(notes.values())
        assert notes["runbook_url"] == f"docs/alerts.md#{name.lower()}"


def test_a_target_is_scraped_every_10_seconds_and_no_job_bears_the_name_of_another(
    prometheus: dict[str, str],
) -> None:
    main = yaml.safe_load(prometheus["prometheus.yml"])
    assert (main["global"]["scrape_interval"], main["global"]["evaluation_interval"]) == (
        "10s",
        "10s",
    )
    jobs = [
        job["job_name"]
        for path, text in prometheus.items()
        if path.startswith("scrape/")
        for job in yaml.safe_load(text)["scrape_configs"]
    ]
    assert len(set(jobs)) == len(jobs)
    assert {"prometheus", "alertmanager", "exporter", "rabbitmq", "publisher", "subscriber"} < {
        *jobs
    }


def test_amtool_takes_the_configuration_with_and_without_receivers_of_the_user_s(
    images: dict[str, str], rendered: Rendered, with_a_team: str
) -> None:
    files = {"a.yml": rendered.first[CONFIG], "b.yml": with_a_team}
    done = run_in(images["alertmanager"], files, "amtool check-config a.yml b.yml")
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("SUCCESS") == 2


@pytest.mark.parametrize(
    ("labels", "default", "team"),
    [
        ("alertname=RabbitMQDown severity=high", "log", "team,log"),
        ("alertname=RabbitMQBacklog severity=low", "log", "log"),
        ("alertname=Watchdog severity=none", "log", "log"),
    ],
)
def test_an_alert_goes_to_the_receivers_that_the_route_names(
    images: dict[str, str],
    rendered: Rendered,
    with_a_team: str,
    labels: str,
    default: str,
    team: str,
) -> None:
    files = {"default.yml": rendered.first[CONFIG], "team.yml": with_a_team}
    # On stderr it warns that it has read no configuration of its own.
    ask = f"amtool config routes test --config.file={{}}.yml {labels} 2>/dev/null"
    done = run_in(images["alertmanager"], files, f"{ask.format('default')} && {ask.format('team')}")
    assert done.stdout.split() == [default, team]


def test_a_notification_is_sent_to_fluentd_when_it_begins_and_when_it_ends(
    rendered: Rendered,
) -> None:
    config = yaml.safe_load(rendered.first[CONFIG])
    assert config["receivers"] == [
        {
            "name": "log",
            "webhook_configs": [{"url": "http://fluentd:9880/alerts", "send_resolved": True}],
        }
    ]
    fluentd = rendered.first["fluentd/fluent.conf"]
    assert re.search(r"@type http\n  bind 0\.0\.0\.0\n  port 9880\n", fluentd)

"""The alerts fire when they must and only then, and go where the route says.

promtool and amtool are those of the images that will read the files; there are two promtools.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from rules import metric_names
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


OTHERS = [{"name": "broker2", "address": "192.0.2.2"}, {"name": "broker3", "address": "192.0.2.3"}]


def configuration(texts: dict[str, str], left_out: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the folder of Prometheus' configuration, path by path, of all that was rendered."""
    return {
        name.removeprefix("prometheus/"): text
        for name, text in texts.items()
        if name.startswith("prometheus/") and name not in left_out
    }


@pytest.fixture(scope="module", params=["prometheus", "next-prometheus"])
def promtool(images: dict[str, str], request: pytest.FixtureRequest) -> str:
    """Return an image with a promtool: Debian's, or a registry's, and that of its next release."""
    return images[request.param]


@pytest.fixture(scope="module")
def prometheus(rendered: Rendered) -> dict[str, str]:
    """Return the folder of Prometheus' configuration, path by path."""
    return configuration(rendered.first, ("prometheus/rules/cluster.yml",))


@pytest.fixture(scope="module")
def of_three(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return all that is rendered on one of three hosts; a queue has thresholds of its own."""
    own = {
        "stack_nodes": ["broker1", "broker2", "broker3"],
        "stack_others": OTHERS,
        "stack_tls": "own",
        "stack_queues": [{"name": "takeaway"}, {"name": "orders.eu"}],
        "monitoring_prometheus_alerts": {
            "RabbitMQBacklog": {"queues": {"orders.eu": 5000}},
            "RabbitMQMessagesOld": {"queues": {"orders.eu": 7200}},
            "RabbitMQUnacknowledged": {"queues": {"orders.eu": 20}},
            "RabbitMQDeadLetters": {"queues": {"orders.eu.dead": 7}},
        },
    }
    return render(tmp_path_factory.mktemp("cluster"), **own)


@pytest.fixture(scope="module")
def prometheus_of_three(of_three: dict[str, str]) -> dict[str, str]:
    """Return the folder of Prometheus' configuration there."""
    return configuration(of_three)


@pytest.fixture(scope="module")
def alerts(prometheus_of_three: dict[str, str]) -> dict[str, Any]:
    """Return every alerting rule by its name."""
    groups = [
        group
        for path, text in prometheus_of_three.items()
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


@pytest.mark.parametrize("hosts", ["prometheus", "prometheus_of_three"])
def test_promtool_takes_the_configuration(
    promtool: str, request: pytest.FixtureRequest, hosts: str
) -> None:
    texts = request.getfixturevalue(hosts).items()
    # It looks for the files that are named as well.
    files = {path: text.replace("/etc/prometheus/", "/tmp/") for path, text in texts}
    files |= dict.fromkeys(("scrape_password", "tls/ca.pem"), "")
    done = run_in(promtool, files, "promtool check config prometheus.yml")
    assert done.returncode == 0, done.stdout
    assert "rule files found" in done.stdout


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_the_rules_do_what_their_cases_say(
    promtool: str, request: pytest.FixtureRequest, case: Path
) -> None:
    nodes = "prometheus_of_three" if case.stem.startswith("cluster") else "prometheus"
    files = {**request.getfixturevalue(nodes), "case.yml": case.read_text()}
    done = run_in(promtool, files, "promtool test rules case.yml")
    assert done.returncode == 0, done.stdout
    assert "SUCCESS" in done.stdout


def test_every_alert_is_seen_to_fire_and_at_least_twice_not_to(
    alerts: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    tests = [test for case in CASES for test in yaml.safe_load(case.read_text())["tests"]]
    checks = [check for test in tests for check in test.get("alert_rule_test", [])]
    fired = Counter(check["alertname"] for check in checks if check.get("exp_alerts"))
    silent = Counter(check["alertname"] for check in checks if not check.get("exp_alerts"))
    assert fired.keys() == alerts.keys()
    assert silent.keys() == alerts.keys() - {"Watchdog"}
    assert {name for name, count in silent.items() if count < 2} == set()
    sums = sum(len(test.get("promql_expr_test", [])) for test in tests)
    with capsys.disabled():
        print(
            f"\n  {len(alerts)} rules, {len(tests)} cases, {len(checks) + sums} checks:"
            f" {fired.total()} that one fires, {silent.total()} that one does not,"
            f" {sums} of what fires in all"
        )


def test_a_rule_reads_the_series_of_a_case_and_a_case_has_those_that_a_rule_reads(
    alerts: dict[str, Any],
) -> None:
    read = {name for rule in alerts.values() for name in metric_names(rule["expr"])}
    series = {
        series["series"].partition("{")[0]
        for case in CASES
        for test in yaml.safe_load(case.read_text())["tests"]
        for series in test.get("input_series", [])
    }
    assert series - read == {"other_config_last_reload_successful"}
    assert read - series == set()


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


def test_all_alertmanagers_of_a_cluster_get_the_same_alert_from_every_prometheus(
    prometheus: dict[str, str], prometheus_of_three: dict[str, str]
) -> None:
    def told(files: dict[str, str]) -> tuple[Any, Any]:
        main = yaml.safe_load(files["prometheus.yml"])
        (static,) = main["alerting"]["alertmanagers"][0]["static_configs"]
        return main["global"]["external_labels"], static["targets"]

    alone = {"stack": "broker", "host": "broker1"}
    assert told(prometheus) == (alone, ["alertmanager:9093"])
    everyone = ["alertmanager:9093", "broker2:9093", "broker3:9093"]
    assert told(prometheus_of_three) == ({"stack": "broker"}, everyone)


def test_alertmanagers_of_a_cluster_verify_each_other(of_three: dict[str, str]) -> None:
    gossip = yaml.safe_load(of_three["alertmanager/cluster.yml"])
    server, client = gossip["tls_server_config"], gossip["tls_client_config"]
    assert server["client_auth_type"] == "RequireAndVerifyClientCert"
    assert (server["client_ca_file"], client["ca_file"]) == ("tls/ca.pem", "tls/ca.pem")
    assert (server["cert_file"], client["cert_file"]) == ("tls/server.pem", "tls/server.pem")
    assert client["server_name"] == "alertmanager"
    assert "insecure_skip_verify" not in client


def test_amtool_takes_the_configuration_of_one_host_and_of_three_and_with_own_receivers(
    images: dict[str, str], rendered: Rendered, of_three: dict[str, str], with_a_team: str
) -> None:
    files = {"a.yml": rendered.first[CONFIG], "b.yml": with_a_team, "c.yml": of_three[CONFIG]}
    done = run_in(images["alertmanager"], files, "amtool check-config a.yml b.yml c.yml")
    assert done.returncode == 0, done.stdout
    # Each says it again of the templates.
    assert re.findall(r"Checking '(..yml)'  SUCCESS", done.stdout) == ["a.yml", "b.yml", "c.yml"]


def test_amtool_takes_the_nights_that_the_documentation_shows(
    images: dict[str, str], tmp_path: Path
) -> None:
    text = (ROOT / "docs/alerts.md").read_text()
    shown = next(
        each for each in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "night" in each
    )
    (tmp_path / "t.tmpl").write_text('{{ define "own" }}{{ .Status }}{{ end }}')
    own = {
        "monitoring_alertmanager_receivers": [TEAM],
        "monitoring_alertmanager_global": {"resolve_timeout": "7m"},
        "monitoring_alertmanager_templates": [str(tmp_path / "*.tmpl")],
        **yaml.safe_load(shown),
    }
    files = {"a.yml": render(tmp_path, **own)[CONFIG], "templates/t.tmpl": "{{ broken"}
    done = run_in(images["alertmanager"], files, "amtool check-config a.yml")
    assert "t.tmpl" in done.stdout, "the templates are not read"
    del files["templates/t.tmpl"]
    done = run_in(images["alertmanager"], files, "amtool check-config a.yml")
    assert done.returncode == 0, done.stdout
    ask = "amtool config routes test --config.file=a.yml severity=low 2>/dev/null"
    assert run_in(images["alertmanager"], files, ask).stdout.split() == ["team,log"]


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
            "webhook_configs": [
                {"url": "http://fluentd:9880/alerts", "send_resolved": True, "max_alerts": 200}
            ],
        }
    ]
    fluentd = rendered.first["fluentd/fluent.conf"]
    assert re.search(r"@type http\n  bind 0\.0\.0\.0\n  port 9880\n", fluentd)

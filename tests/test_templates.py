"""The configurations, rendered by Ansible from the defaults, say what the design promises."""

import base64
import fcntl
import hashlib
import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import ROOT, TEMPLATES, Rendered, render

EXCHANGE, QUEUE, DEAD = "takeaway-in", "takeaway", "takeaway.dead"

# What a pattern could match by mistake.
NAMES = ["", EXCHANGE, QUEUE, DEAD, "amq.default", "amq.direct", "takeaway_dead", "takeawayxdead"]
NAMES += [f"x{name}" for name in NAMES] + [f"{name}x" for name in NAMES] + ["takeaway.dead.dead"]


@pytest.fixture(scope="module")
def definitions(rendered: Rendered) -> Any:
    return json.loads(rendered.first["rabbitmq/definitions.json"])


def test_every_template_is_rendered(rendered: Rendered) -> None:
    assert TEMPLATES
    assert len(rendered.first) == len(TEMPLATES)
    assert [name for name, text in rendered.first.items() if not text.strip()] == []


def test_a_second_rendering_changes_nothing(rendered: Rendered) -> None:
    assert rendered.first == rendered.second


def test_passwords_are_long_all_different_and_for_their_owner_only(rendered: Rendered) -> None:
    files = list(rendered.secrets.iterdir())
    assert len(files) == 6
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)
    passwords = [path.read_text().strip() for path in files]
    assert all(re.fullmatch("[A-Za-z0-9]{32}", password) for password in passwords)
    assert len(set(passwords)) == 6


def test_no_rendered_file_carries_a_password(rendered: Rendered) -> None:
    passwords = [path.read_text().strip() for path in rendered.secrets.iterdir()]
    texts = rendered.first.values()
    assert not [password for password in passwords if any(password in text for text in texts)]


def test_every_password_logs_its_user_in(rendered: Rendered, definitions: Any) -> None:
    for user in definitions["users"]:
        assert user["hashing_algorithm"] == "rabbit_password_hashing_sha256"
        raw = base64.b64decode(user["password_hash"], validate=True)
        password = (rendered.secrets / f"rabbitmq_{user['name']}").read_text().strip()
        assert hashlib.sha256(raw[:4] + password.encode()).digest() == raw[4:], user["name"]


@pytest.mark.parametrize(
    ("user", "configure", "write", "read"),
    [
        ("admin", set(NAMES), set(NAMES), set(NAMES)),
        ("publisher", {""}, {EXCHANGE}, {""}),
        ("subscriber", {""}, {EXCHANGE}, {QUEUE, DEAD}),
        ("monitor", {""}, {""}, {""}),
    ],
)
def test_a_user_may_do_what_it_must_and_nothing_else(
    definitions: Any, user: str, configure: set[str], write: set[str], read: set[str]
) -> None:
    (granted,) = (one for one in definitions["permissions"] if one["user"] == user)
    assert granted["vhost"] == "/"
    reach = {
        kind: {name for name in NAMES if re.search(granted[kind], name)}
        for kind in ("configure", "write", "read")
    }
    assert reach == {"configure": configure, "write": write, "read": read}


def test_nobody_else_has_permissions(definitions: Any) -> None:
    users = sorted(user["name"] for user in definitions["users"])
    assert sorted(one["user"] for one in definitions["permissions"]) == users
    assert "topic_permissions" not in definitions


@pytest.mark.parametrize(
    ("queue", "other", "limit", "arguments"),
    [
        pytest.param(QUEUE, DEAD, 20, {}, id="queue"),
        pytest.param(DEAD, QUEUE, -1, {"x-delivery-limit": -1}, id="dead queue"),
    ],
)
def test_a_given_up_message_goes_to_the_other_queue_whatever_policies_people_add(
    definitions: Any, queue: str, other: str, limit: int, arguments: dict[str, int]
) -> None:
    kept = {
        "dead-letter-exchange": "",
        "dead-letter-routing-key": other,
        "dead-letter-strategy": "at-least-once",
        "overflow": "reject-publish",
    }
    # rabbitmq_memory 1G: a message with an expiration takes 500 bytes while its queue is recovered.
    tuned = {"delivery-limit": limit, "max-length": 1024**3 // 2048}
    # A queue's own arguments hold without a policy, and its policy where it was made without them.
    (own,) = (one["arguments"] for one in definitions["queues"] if one["name"] == queue)
    kept_by_the_queue = {f"x-{name}": value for name, value in kept.items()} | arguments
    assert own == {"x-queue-type": "quorum"} | kept_by_the_queue
    (policy,) = (one for one in definitions["policies"] if re.search(one["pattern"], queue))
    assert [name for name in NAMES if re.search(policy["pattern"], name)] == [queue]
    assert (policy["name"], policy["vhost"]) == (f"stack:{queue}", "/")
    assert policy["apply-to"] in {"queues", "quorum_queues"}
    assert policy["definition"] == kept | tuned
    # Of all that match, only the policy with the highest priority acts.
    assert policy["priority"] >= 1000


def test_a_new_queue_changes_what_is_imported_and_what_prometheus_watches_and_nothing_else(
    rendered: Rendered, tmp_path: Path
) -> None:
    queues = [{"name": "b.c"}, {"name": "takeaway"}]
    texts = render(tmp_path, stack_queues=queues, stack_secrets_dir=str(rendered.secrets))
    changed = {name for name, text in texts.items() if text != rendered.first[name]}
    assert changed == {"rabbitmq/definitions.json", "prometheus/rules/queues.yml"}
    rules = texts["prometheus/rules/queues.yml"]
    assert 'queue=~"(b[.]c|takeaway)([.]dead)?", policy!~"stack:.*"' in rules
    # The label by which the broker's container is made anew leaves the definitions out.
    task = (ROOT / "roles/rabbitmq/tasks/rabbitmq.yml").read_text()
    assert "config_hash(stack_salt, __rabbitmq_reread)" in task
    values = yaml.safe_load((ROOT / "roles/rabbitmq/vars/main.yml").read_text())
    assert "['definitions.json'] +" in values["__rabbitmq_reread"]


def test_every_container_logs_under_a_tag_that_has_a_file(rendered: Rendered) -> None:
    text = rendered.first["fluentd/fluent.conf"]
    (named,) = re.findall(r"^<match /\\A\((.+)\)\\z/>$", text, re.MULTILINE)
    tags = {}
    for path in ROOT.glob("roles/*/tasks/*.yml"):
        for task in yaml.safe_load(path.read_text()):
            container = task.get("community.docker.docker_container", {})
            # Others remove a container, or wait for it.
            if "image" in container:
                options = str(container.get("log_options"))
                tag = re.search(r"stack_log_options \| combine\(\{'tag': '(\w+)'\}\)", options)
                tags[path.stem] = tag[1] if tag else None
    # A container's name is its task file's.
    assert tags.pop("fluentd") is None
    assert tags == {name: name for name in tags}
    assert tags.keys() <= set(named.split("|"))


def test_a_front_is_there_and_scraped_only_where_the_stack_is_guarded(
    rendered: Rendered, tmp_path: Path
) -> None:
    def jobs(texts: dict[str, str]) -> list[str]:
        scrapes = yaml.safe_load(texts["prometheus/scrape/stack.yml"])["scrape_configs"]
        return [scrape["job_name"] for scrape in scrapes]

    values = {"stack_tls": "own", "stack_secrets_dir": str(rendered.secrets)}
    assert "front" not in jobs(rendered.first)
    assert set(jobs(render(tmp_path, **values))) - set(jobs(rendered.first)) == {"front"}


def test_the_front_speaks_tls_at_every_published_port_or_at_none(
    rendered: Rendered, tmp_path: Path
) -> None:
    def published(texts: dict[str, str]) -> dict[str, str]:
        binds = re.findall(r"^  bind :(\d+)(.*)$", texts["front/haproxy.cfg"], re.MULTILINE)
        return {port: how for port, how in binds if port != "8405"}

    values = {"stack_tls": "own", "stack_secrets_dir": str(rendered.secrets)}
    plain, tls = published(rendered.first), published(render(tmp_path, **values))
    assert plain == dict.fromkeys(("5000", "5001", "9149", "15692"), "")
    assert tls.keys() == plain.keys()
    assert {how.split()[0] for how in tls.values()} == {"ssl"}


def test_groups_say_which_hosts_have_doors_and_monitoring(
    rendered: Rendered, tmp_path: Path
) -> None:
    """On the first of three hosts, broker1, which has the monitoring alone and no doors."""
    names = ["broker1", "broker2", "broker3"]
    values = {"stack_tls": "own", "stack_secrets_dir": str(rendered.secrets), "stack_nodes": names}
    values["stack_others"] = [
        {"name": name, "address": f"192.0.2.{name[-1]}"} for name in names[1:]
    ]
    narrow = {"stack_doors": ["broker3"], "stack_monitors": ["broker1"]}

    def found(texts: dict[str, str]) -> list[Any]:
        servers = re.findall(r"^  server (?:broker|own)\S* (\S+)", texts["front/haproxy.cfg"], re.M)
        prometheus = yaml.safe_load(texts["prometheus/prometheus.yml"])
        (managers,) = prometheus["alerting"]["alertmanagers"]
        jobs = yaml.safe_load(texts["prometheus/scrape/stack.yml"])["scrape_configs"]
        return [
            servers,
            managers["static_configs"][0]["targets"],
            [
                target
                for job in jobs
                if re.match("publisher|prometheus", job["job_name"])
                for static in job["static_configs"]
                for target in static["targets"]
            ],
        ]

    own = ["publisher:5000", "subscriber:5001"]
    every = [f"192.0.2.{host}:{port}" for port in (5000, 5001) for host in (2, 3)]
    assert found(render(tmp_path, **values)) == [
        [own[0], *every[:2], own[0], own[1], *every[2:], own[1]],
        ["alertmanager:9093", "broker2:9093", "broker3:9093"],
        [own[0], "broker2:5000", "broker3:5000", "prometheus:9090", "broker2:9090", "broker3:9090"],
    ]
    nobody = "127.0.0.1:1"
    assert found(render(tmp_path, **values, **narrow)) == [
        [nobody, "192.0.2.3:5000", nobody, nobody, "192.0.2.3:5001", nobody],
        ["alertmanager:9093"],
        ["broker3:5000", "prometheus:9090"],
    ]


def test_the_front_lets_both_users_of_the_monitoring_in(rendered: Rendered) -> None:
    expected = {
        hashlib.sha256(base64.b64encode(f"{user}:{password}".encode())).hexdigest().upper()
        for user, file in (("monitoring", "monitoring"), ("prometheus", "monitoring_scrape"))
        for password in [(rendered.secrets / file).read_text().strip()]
    }
    text = rendered.first["front/haproxy.cfg"]
    known = re.findall(r"^  acl known .* -m str (.+)$", text, re.MULTILINE)
    assert [set(logins.split()) for logins in known] == [expected, expected]


def test_every_engine_since_20_10_knows_the_options_of_its_log_driver() -> None:
    values = yaml.safe_load((ROOT / "roles/stack/defaults/main.yml").read_text())
    assert values["stack_log_options"].keys() <= {
        "fluentd-address",
        "fluentd-async",
        "fluentd-buffer-limit",
        "fluentd-max-retries",
        "fluentd-request-ack",
        "fluentd-retry-wait",
        "fluentd-sub-second-precision",
    }


def test_a_tag_names_a_file_only_where_it_is_known(rendered: Rendered) -> None:
    text = rendered.first["fluentd/fluent.conf"]
    paths = re.findall(r"^<match (.+)>\n  @type file\n  @id \w+\n  path (\S+)$", text, re.MULTILINE)
    assert len(paths) == 2
    (match,) = [match for match, path in paths if "${tag}" in path]
    assert re.fullmatch(r"/\\A\((\w+\|)*\w+\)\\z/", match)


def prune(
    rendered: Rendered, folder: Path, files: dict[str, tuple[int, int]], timeout: float = 60
) -> list[str]:
    """Make files, each of an age in seconds and a size in MiB; return what pruning leaves."""
    now = time.time()
    for name, (age, size) in files.items():
        path = folder / name
        path.touch()
        os.truncate(path, size << 20)
        os.utime(path, (now - age, now - age))
    script = rendered.first["fluentd/prune.sh"].replace("/fluentd/log", "$LOGS")
    environment = {**os.environ, "LOGS": str(folder)}
    subprocess.run(["sh", "-c", script], env=environment, check=True, timeout=timeout)
    return sorted(path.name for path in folder.iterdir())


def test_who_prunes_waits_for_another_one_to_end(rendered: Rendered, tmp_path: Path) -> None:
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(subprocess.TimeoutExpired):
        prune(rendered, tmp_path, {}, timeout=0.5)
    os.close(other)
    assert prune(rendered, tmp_path, {}) == []


def test_what_is_old_is_pruned_and_broken_chunks_too(rendered: Rendered, tmp_path: Path) -> None:
    old, new = (15 * 86400, 1), (10, 1)
    files = {"alerts.20260101.log": old, "broken.b1.log": old, "broken.b1.log.meta": old}
    kept = {"buffer.b2.log": old, "notes": old, "rabbitmq.20260102.log": new}
    assert prune(rendered, tmp_path, files | kept) == sorted(kept)


def test_a_flood_costs_no_other_service_a_line(rendered: Rendered, tmp_path: Path) -> None:
    # The limit is 256 MiB, of which a tenth stays free.
    others = {f"{name}.20260101.log": (9000, 12) for name in ("publisher", "subscriber", "other")}
    others["alerts.20260101.log"] = (9999, 30)
    flood = {f"rabbitmq.20260102.00000{n}.log": (100 - n, 30) for n in range(9)}
    left = prune(rendered, tmp_path, others | flood)
    assert [name for name in left if not name.startswith("rabbitmq")] == sorted(others)
    # 66 MiB are the others', and 230 are allowed.
    assert [name for name in left if name.startswith("rabbitmq")] == list(flood)[-5:]


def test_also_the_newest_file_is_cut(rendered: Rendered, tmp_path: Path) -> None:
    files = {"x.20260101.log": (5, 1), "rabbitmq.20260102.log": (0, 2000)}
    assert prune(rendered, tmp_path, files) == ["x.20260101.log"]


def test_an_eighth_of_the_alerts_does_not_count(rendered: Rendered, tmp_path: Path) -> None:
    alerts = {f"alerts.20260101.00000{n}.log": (100 - n, 25) for n in range(5)}
    others = {f"exporter.20260101.00000{n}.log": (50 - n, 25) for n in range(5)}
    assert prune(rendered, tmp_path, alerts | others) == sorted([*alerts, *list(others)[1:]])

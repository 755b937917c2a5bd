"""What roles compute: the broker's hashes, what it has lost, its bounds; where images come from."""

import base64
import copy
import hashlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FILTERS = Path(__file__).parents[1] / "plugins/filter"


@pytest.fixture(scope="module")
def filters() -> Any:
    """Return every filter, by name."""
    found = {}
    for plugin in FILTERS.glob("*.py"):
        spec = importlib.util.spec_from_file_location(f"{plugin.stem}_filters", plugin)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found |= module.FilterModule().filters()
    return found


@pytest.fixture(scope="module")
def hashed(filters: Any) -> Any:
    return filters["rabbitmq_password_hash"]


def verifies(text: str, password: str) -> bool:
    """Do what the broker does when somebody logs in: rabbit_password_hashing_sha256."""
    raw = base64.b64decode(text, validate=True)
    return len(raw) == 36 and hashlib.sha256(raw[:4] + password.encode()).digest() == raw[4:]


def test_the_verification_agrees_with_rabbitmq_s_documentation() -> None:
    # https://www.rabbitmq.com/docs/passwords#computing-password-hash, salt 908D C60A
    documented = "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR"
    assert base64.b64decode(documented)[:4] == bytes.fromhex("908DC60A")
    assert verifies(documented, "test12")
    assert not verifies(documented, "test13")


@pytest.mark.parametrize("password", ["test12", "", "pässwörd 🍕", "x" * 1000])
def test_a_hash_is_one_that_the_broker_verifies(hashed: Any, password: str) -> None:
    assert verifies(hashed(password, "admin"), password)


def test_a_hash_is_the_same_at_every_run(hashed: Any) -> None:
    assert hashed("test12", "admin") == hashed("test12", "admin")


def test_users_with_one_password_do_not_share_a_hash(hashed: Any) -> None:
    assert hashed("test12", "admin") != hashed("test12", "monitor")


def test_another_password_brings_another_salt(hashed: Any) -> None:
    assert hashed("test12", "admin")[:5] != hashed("test13", "admin")[:5]


@pytest.mark.parametrize(
    ("memory", "size"),
    [(512 << 20, 32 << 20), (1 << 30, 64 << 20), (8 << 30, 512 << 20), (64 << 30, 512 << 20)],
)
def test_the_write_ahead_log_is_a_share_of_the_memory_for_every_version(
    filters: Any, memory: int, size: int
) -> None:
    # Until 4.2 the quorum queues take the value of ra, since 4.3 that of rabbit.
    words = filters["rabbitmq_erlang_args"](memory).split()
    assert words == [
        *("-ra", "wal_max_size_bytes", str(size)),
        *("-rabbit", "quorum_wal_max_size_bytes", str(size)),
    ]


WANTED: dict[str, Any] = {
    "users": [{"name": "monitor", "password_hash": "aGFzaA==", "tags": ["monitoring"]}],
    "vhosts": [{"name": "/"}],
    "permissions": [{"user": "monitor", "vhost": "/", "read": "^$"}],
    "queues": [{"name": "takeaway", "vhost": "/", "arguments": {"x-queue-type": "quorum"}}],
    "bindings": [{"source": "in", "vhost": "/", "destination": "takeaway", "arguments": {}}],
}
NAMES = ["users monitor", "vhosts /", "permissions monitor", "queues takeaway", "bindings takeaway"]


@pytest.fixture
def found() -> Any:
    """What a broker answers that has all of WANTED, and more."""
    answer = copy.deepcopy(WANTED) | {"rabbitmq_version": "4.0.5", "parameters": []}
    answer["users"][0]["limits"] = {}
    answer["queues"].insert(0, {"name": "another", "vhost": "/"})
    return answer


def test_nothing_is_missing_where_all_is_there(filters: Any, found: Any) -> None:
    found["queues"][1]["arguments"] = {"x-queue-type": "classic"}
    assert filters["rabbitmq_missing"](WANTED, found) == []


def test_a_policy_of_an_older_version_is_missing_and_its_queue_without_arguments_is_not(
    filters: Any, found: Any
) -> None:
    wanted = WANTED | {"policies": [{"name": "dead-letter", "vhost": "/", "priority": 1000}]}
    found["policies"] = [{"name": "dead-letter", "vhost": "/", "priority": 0}]
    found["queues"][1]["arguments"] = {}
    assert filters["rabbitmq_missing"](wanted, found) == ["policies dead-letter"]


def test_a_broker_that_tells_nothing_lacks_all(filters: Any) -> None:
    assert filters["rabbitmq_missing"](WANTED, {}) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_was_removed_is_missing(filters: Any, found: Any, name: str) -> None:
    found[name.split()[0]].pop()
    assert filters["rabbitmq_missing"](WANTED, found) == [name]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("users monitor", {"password_hash": "b3RoZXI="}),
        ("users monitor", {"tags": []}),
        ("permissions monitor", {"read": ".*"}),
        ("queues takeaway", {"vhost": "another"}),
    ],
)
def test_what_was_changed_is_missing(
    filters: Any, found: Any, name: str, change: dict[str, Any]
) -> None:
    found[name.split()[0]][-1] |= change
    assert filters["rabbitmq_missing"](WANTED, found) == [name]


OWN = {"name": "own", "vhost": "/", "priority": 1000, "apply-to": "quorum_queues", "pattern": ".*"}


@pytest.mark.parametrize(
    ("change", "overruled"),
    [
        ({}, ["takeaway: other"]),
        ({"priority": 1000}, ["takeaway: other"]),
        ({"priority": 999}, []),
        ({"apply-to": "all"}, ["takeaway: other"]),
        ({"apply-to": "classic_queues"}, []),
        ({"pattern": "^take"}, ["takeaway: other"]),
        ({"pattern": "^away"}, []),
        # Perl knows \K, Python does not.
        ({"pattern": "take\\Kaway"}, ["takeaway: other"]),
        ({"vhost": "another"}, []),
        ({"name": "own"}, []),
    ],
)
def test_a_policy_in_the_place_of_the_stack_s_is_told(
    filters: Any, found: Any, change: dict[str, Any], overruled: list[str]
) -> None:
    other = {**OWN, "name": "other", "priority": 1001, "apply-to": "queues", **change}
    found["policies"] = [OWN, other]
    assert filters["rabbitmq_overruled"](WANTED | {"policies": [OWN]}, found) == overruled
    assert filters["rabbitmq_overruled"](WANTED | {"policies": [OWN]}, {}) == []


@pytest.fixture
def plan(filters: Any, tmp_path: Path) -> Any:
    """Return a function that plans the images of a tree that a test may change."""
    for name in ("images/base", "images/own", "apps/door", "apps/app"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "Dockerfile").write_text("FROM x\n")
    wanted = {
        "own": {"contexts": ["images/own"], "base": "debian", "upstream": "official:1"},
        "app": {"contexts": ["apps/door", "apps/app"]},
    }
    settings = {"root": str(tmp_path), "stack": "broker", "debian": "debian:x", "revision": 1}

    def planned(source: str = "build", **others: Any) -> dict[str, dict[str, str]]:
        images = filters["image_plan"](wanted, **{**settings, "source": source, **others})
        return {image["name"]: image for image in images}

    return planned


@pytest.mark.parametrize(
    ("given", "own", "app"),
    [
        ({"source": "build"}, ("build", "broker/own:"), ("build", "broker/app:")),
        ({"source": "registry"}, ("upstream", "official:1"), ("build", "broker/app:")),
        ({"registry": "r:5"}, ("registry", "r:5/broker/own:"), ("registry", "r:5/broker/app:")),
        (
            {"source": "registry", "registry": "r:5", "push": True},
            ("build", "r:5/broker/own:"),
            ("build", "r:5/broker/app:"),
        ),
    ],
)
def test_an_image_comes_from_where_it_can_be_had(
    plan: Any, given: dict[str, Any], own: tuple[str, str], app: tuple[str, str]
) -> None:
    images = plan(**given)
    assert list(images) == ["base", "own", "app"]
    assert (images["own"]["origin"], images["app"]["origin"]) == (own[0], app[0])
    assert images["own"]["ref"].startswith(own[1])
    assert images["app"]["ref"].startswith(app[1])
    assert (images["base"]["origin"], images["base"]["ref"][:12]) == ("build", "broker/base:")


@pytest.mark.parametrize(
    ("path", "changed"),
    [
        ("images/own/Dockerfile", {"own"}),
        ("apps/door/new/file", {"app"}),
        # What stands on the base is built anew with it.
        ("images/base/Dockerfile", {"base", "app"}),
        ("apps/app/tests/test_app.py", set()),
        ("apps/app/app/__pycache__/app.pyc", set()),
        ("apps/app/.mypy_cache/3.13/app", set()),
    ],
)
def test_an_image_is_named_by_its_content(
    plan: Any, tmp_path: Path, path: str, changed: set[str]
) -> None:
    before = plan()
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text("changed")
    after = plan()
    assert {name for name in after if after[name]["ref"] != before[name]["ref"]} == changed


def test_a_revision_and_another_debian_name_every_built_image_anew(plan: Any) -> None:
    one, two, other = plan(), plan(revision=2), plan(debian="debian:y")
    for name, image in one.items():
        assert len({image["ref"], two[name]["ref"], other[name]["ref"]}) == 3


def test_what_is_there_is_not_missing_and_the_base_only_where_something_stands_on_it(
    filters: Any, plan: Any
) -> None:
    def missing(*there: str) -> list[str]:
        images = [{"RepoTags": [planned[name]["ref"]], "RepoDigests": None} for name in there]
        return [image["name"] for image in filters["image_missing"](planned.values(), images)]

    planned = plan()
    assert missing() == ["base", "own", "app"]
    assert missing("app") == ["own"]
    assert missing("own", "app") == []
    assert missing("base", "own") == ["app"]
    planned = plan(registry="r:5")
    assert missing("own") == ["app"]


def test_a_run_is_gone_when_its_process_is_and_only_its_own_machine_can_tell(
    filters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, gone = filters["preflight_owner"], filters["preflight_gone"]
    mine = owner("make up")
    assert re.fullmatch(rf"make up by process {os.getppid()} on {socket.gethostname()}", mine)
    assert gone(mine), "this very run may go on"
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert gone(f"make up by process 1 on {socket.gethostname()}"), "process 1 is another program"
    command = [sys.executable, "-c", "print(flush=True); input()", "ansible"]
    with subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-3) as child:
        assert child.stdout
        child.stdout.readline()
        alive = f"make up by process {child.pid} on {socket.gethostname()}"
        assert not gone(alive)
        assert not gone(f"{alive}-other"), "only the other machine can tell"
    assert gone(alive)
    assert not gone("")
    assert not gone("something else")


OWN_LABEL = {"message-broker-stack": "broker"}


def container(name: str, labels: dict[str, str] | None, *ports: int) -> dict[str, Any]:
    published = [{"PublicPort": port} for port in ports]
    return {"Names": [f"/{name}"], "Image": "x:1", "Labels": labels, "Ports": published}


def test_only_what_carries_the_stack_s_label_is_its_own(filters: Any) -> None:
    own = container("broker-rabbitmq", OWN_LABEL)
    containers = [own, container("broker-fluentd", None), container("other-exporter", {})]
    assert filters["preflight_own"](containers, "broker") == {"rabbitmq": own}
    volumes = [
        {"Name": "broker-rabbitmq", "Labels": OWN_LABEL, "Mountpoint": "/1"},
        {"Name": "broker-prometheus", "Labels": None, "Mountpoint": "/2"},
    ]
    names = ["rabbitmq", "fluentd", "prometheus"]
    assert filters["preflight_foreign"](names, "broker", containers, volumes) == [
        "broker-fluentd (container of image x:1)",
        "broker-prometheus (volume at /2)",
    ]


def test_what_begins_like_an_option_and_is_none_is_unknown(filters: Any, tmp_path: Path) -> None:
    for role, options in {"one": {"one_a": {}, "other_b": {}}, "two": {"two_a": {}}}.items():
        (tmp_path / role / "meta").mkdir(parents=True)
        specs = {"argument_specs": {"main": {"options": options}}}
        (tmp_path / role / "meta/argument_specs.yml").write_text(json.dumps(specs))
    names = ["one_a", "one_b", "two_b", "other_b", "other_c", "two_a", "onerous"]
    assert filters["preflight_unknown"](names, str(tmp_path)) == ["one_b", "two_b"]


def test_a_port_that_two_variables_have_is_told(filters: Any) -> None:
    ports = {"a_port": "5000", "b_port": "5001", "c_port": "5000"}
    assert filters["preflight_twice"](ports) == ["a_port and c_port are 5000"]


def test_a_port_is_free_where_the_container_itself_publishes_it(filters: Any) -> None:
    containers = {"x": {"ports": ["a_port", "b_port"]}, "y": {"ports": ["c_port"]}}
    own = {"x": container("broker-x", OWN_LABEL, 5000), "y": container("broker-y", {}, 5001)}
    ports = {"a_port": "5000", "b_port": "5001", "c_port": "5000"}
    # 5001 is y's, and 5000 x's, until they are made anew.
    expected = {"b_port": "5001", "c_port": "5000"}
    assert filters["preflight_not_held"](ports, containers, own) == expected


FILES = {"main.conf": "a", "rules/one.yml": "b"}


def on_the_host(path: str, text: str | None, **more: Any) -> dict[str, Any]:
    """Return what ansible.builtin.find tells of a file, or of a folder where text is None."""
    kind: dict[str, Any] = {"isdir": text is None, "isreg": text is not None}
    kind |= {"mode": "0750" if text is None else "0640", "uid": 0, "gid": 10001}
    if text is not None:
        kind["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    return {"path": f"/etc/x{path}", **kind, **more}


RIGHT = [
    on_the_host("", None),
    on_the_host("/main.conf", "a"),
    on_the_host("/rules", None),
    on_the_host("/rules/one.yml", "b"),
]


@pytest.mark.parametrize(
    ("found", "changes"),
    [
        (RIGHT, {}),
        ([], {"folders": ["", "rules"], "write": ["main.conf", "rules/one.yml"]}),
        ([*RIGHT[1:], on_the_host("", None, mode="0755")], {"folders": [""]}),
        ([*RIGHT[:-1], on_the_host("/rules/one.yml", "c")], {"write": ["rules/one.yml"]}),
        ([*RIGHT[:-1], on_the_host("/rules/one.yml", "b", gid=0)], {"write": ["rules/one.yml"]}),
        ([*RIGHT, on_the_host("/rules/old.yml", "b")], {"remove": ["rules/old.yml"]}),
        ([*RIGHT, on_the_host("y/another.yml", "b")], {}),
    ],
    ids=["right", "nothing", "mode", "text", "group", "more", "neighbour"],
)
def test_a_configuration_is_told_where_it_differs(
    filters: Any, found: list[dict[str, Any]], changes: dict[str, list[str]]
) -> None:
    expected = {"folders": [], "write": [], "remove": [], **changes}
    assert filters["config_changes"](FILES, found, "/etc/x", 10001) == expected


def test_a_check_has_the_files_where_the_container_has_them(filters: Any, tmp_path: Path) -> None:
    texts = {"a b.conf": "it's $HOME\n", "rules/one.yml": "\u00e4"}
    script = filters["config_script"](
        texts, str(tmp_path), "cat 'a b.conf' rules/one.yml >&2; false"
    )
    done = subprocess.run(
        ["sh", "-e"], input=script, capture_output=True, text=True, check=False, timeout=10
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "it's $HOME\n\u00e4", "")


def test_prometheus_scrapes_what_the_catalogue_says(filters: Any) -> None:
    params = {"family": ["queue"]}
    more = {"job": "rabbitmq_detailed", "port": 2, "path": "/more", "params": params}
    catalogue = {"rabbitmq": {"scrapes": [{"port": 1}, more]}, "fluentd": {}}
    assert filters["monitoring_scrapes"](catalogue) == [
        {"job_name": "rabbitmq", "static_configs": [{"targets": ["rabbitmq:1"]}]},
        {
            "job_name": "rabbitmq_detailed",
            "metrics_path": "/more",
            "params": params,
            "static_configs": [{"targets": ["rabbitmq:2"]}],
        },
    ]


def test_an_official_image_is_what_its_variable_names(filters: Any) -> None:
    catalogue = {"a": {"image": {"contexts": ["x"], "upstream": "a_image"}}}
    catalogue |= {"b": {"image": {"contexts": ["y"]}}, "c": {}}
    wanted = filters["image_wanted"](catalogue, ["a", "b"], {"a_image": "a:1"})
    assert wanted == {
        "a": {"contexts": ["x"], "upstream": "a:1"},
        "b": {"contexts": ["y"], "upstream": ""},
    }


def test_what_is_backed_up_is_the_volume_of_each_container_that_has_data(filters: Any) -> None:
    def mounted(name: str, source: str) -> dict[str, str]:
        return {"Type": "volume", "Name": name, "Source": source}

    bind, other = {"Type": "bind", "Source": "/etc/x"}, mounted("0a1b", "/v/0")
    containers = {
        name: {"Names": [f"/b-{name}"], "State": state, "Mounts": mounts}
        for name, state, mounts in [
            ("rabbitmq", "running", [bind, other, mounted("b-rabbitmq", "/v/1")]),
            ("prometheus", "exited", [mounted("b-prometheus", "/v/2")]),
            ("publisher", "running", [bind]),
        ]
    }
    services = ["rabbitmq", "alertmanager", "prometheus"]
    assert filters["backup_running"](services, containers) == ["rabbitmq"]
    folders = {"rabbitmq": "/v/1", "prometheus": "/v/2"}
    assert filters["backup_volumes"](services, containers) == folders


def test_what_carries_the_stack_s_label_is_there_already(filters: Any) -> None:
    volumes = [{"Name": "broker-x", "Labels": OWN_LABEL}, {"Name": "y", "Labels": None}]
    containers = [container("broker-a", OWN_LABEL), container("broker-b", {}), container("c", None)]
    host = {"containers": containers, "volumes": volumes}
    there = ["container broker-a", "volume broker-x"]
    assert filters["preflight_there"](host, "broker") == there


def test_a_password_file_that_no_run_could_use_is_told(filters: Any) -> None:
    def file(path: str, size: int = 32, uid: int = os.getuid()) -> dict[str, Any]:
        return {"path": path, "size": size, "uid": uid}

    files = [file("/good"), file("/empty", 0), file("/x.lockfile"), file("/other", uid=4242)]
    assert filters["preflight_useless"](files) == ["/empty", "/x.lockfile", "/other"]


def test_a_receiver_s_file_is_a_secret_that_is_given_or_the_image_s(filters: Any) -> None:
    folder = "/etc/alertmanager/secrets"
    receivers = [
        {"webhook_configs": [{"url_file": f"{folder}/one"}, {"url_file": f"{folder}/empty"}]},
        {"email_configs": [{"tls_config": {"ca_file": "/etc/ssl/ca.pem"}, "to": "a_file"}]},
        {"email_configs": [{"auth_password_file": "/elsewhere"}]},
    ]
    missing = filters["monitoring_missing_secrets"](receivers, {"one": "1", "empty": ""})
    assert missing == [f"{folder}/empty", "/elsewhere"]


@pytest.mark.parametrize(
    ("given", "bad"),
    [
        ({"for": "1m30s", "above": 0.5, "within": "1d", "hours": "4"}, []),
        ({"for": "0s"}, ["0s"]),
        ({"for": "90"}, ["90"]),
        ({"for": ""}, [""]),
        ({"above": -1}, ["-1"]),
        ({"above": "1\n"}, ["1\n"]),
        ({"below": 1}, ["below"]),
    ],
)
def test_an_alert_takes_the_values_that_it_knows(
    filters: Any, given: dict[str, Any], bad: list[str]
) -> None:
    known = dict.fromkeys(("for", "above", "within", "hours"))
    assert filters["monitoring_bad_values"](given, known) == bad

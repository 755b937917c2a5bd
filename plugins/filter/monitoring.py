"""Filters that the role monitoring computes with."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from copy import deepcopy
from functools import cache
from pathlib import PurePosixPath
from typing import Any

from ansible.errors import AnsibleFilterError

# Where Alertmanager has its secrets in the container.
SECRETS = "/etc/alertmanager/secrets"
# Source: https://prometheus.io/docs/prometheus/latest/querying/basics/#float-literals-and-time-durations
DURATION = re.compile(
    r"(?=[0-9])(?!0+[a-z])(\d+y)?(\d+w)?(\d+d)?(\d+h)?(\d+m)?(\d+s)?(\d+ms)?", re.ASCII
)
MAX_PASSWORD = 72
NUMBER = re.compile(r"[0-9]+([.][0-9]+)?")


def monitoring_client(folder: str, guarded: bool, tls: bool, name: str = "") -> dict[str, Any]:
    """Return how Prometheus' and Alertmanager's programs ask a server of the stack.

    The files are in folder; name is what the certificate has, where that is not the container's.
    Source: https://prometheus.io/docs/alerting/latest/configuration/#http_config
    """
    client: dict[str, Any] = {}
    if guarded:
        password = f"{folder}/scrape_password"
        client["basic_auth"] = {"username": "prometheus", "password_file": password}
    if tls:
        client["tls_config"] = {"ca_file": f"{folder}/tls/ca.pem"}
        if name:
            client["tls_config"]["server_name"] = name
    return client


def monitoring_web(passwords: Mapping[str, str], salt: str, tls: bool) -> dict[str, Any]:
    """Return the web configuration that Prometheus and Alertmanager have in common.

    Who asks needs one of passwords, by user; of them it has bcrypt's hashes, the same at each run.
    Source: https://prometheus.io/docs/prometheus/latest/configuration/https/
    """
    web: dict[str, Any] = {
        "basic_auth_users": {
            user: _bcrypt(password, f"{salt}{user}") for user, password in passwords.items()
        }
    }
    if tls:
        web["tls_server_config"] = {
            "cert_file": "tls/server.pem",
            "key_file": "tls/server.pem",
            "min_version": "TLS12",
        }
    return web


@cache
def _bcrypt(password: str, salt: str) -> str:
    try:
        import bcrypt
    except ImportError:
        raise AnsibleFilterError(
            "Prometheus and Alertmanager take passwords as bcrypt's hashes; install the Python"
            " package bcrypt where Ansible runs."
        ) from None
    if len(password.encode()) > MAX_PASSWORD:
        raise AnsibleFilterError(
            f"A password for the monitoring has more than {MAX_PASSWORD} bytes, which bcrypt takes"
            " at most; write a shorter one into the file monitoring or monitoring_scrape."
        )
    # 22 digits of bcrypt's base 64 are a salt; the last one has two bits.
    digits = f"{hashlib.sha256(salt.encode()).hexdigest()[:21]}e"
    return bcrypt.hashpw(password.encode(), f"$2b$10${digits}".encode()).decode()


def monitoring_scrapes(
    containers: Mapping[str, Any], folder: str, guarded: bool, tls: bool, name: str = ""
) -> list[dict[str, Any]]:
    """Return Prometheus' scrape_configs for the containers of the catalogue.

    The rest is as monitoring_client has it.
    Source: https://prometheus.io/docs/prometheus/latest/configuration/configuration/#scrape_config
    """
    return [
        {
            "job_name": scrape.get("job", container_name),
            **({"metrics_path": scrape["path"]} if "path" in scrape else {}),
            **({"params": scrape["params"]} if "params" in scrape else {}),
            **({"scheme": "https"} if tls and "tls" in scrape else {}),
            **monitoring_client(
                folder, guarded and "password" in scrape, tls and "tls" in scrape, name
            ),
            "static_configs": [{"targets": [f"{container_name}:{scrape['port']}"]}],
        }
        for container_name, container in containers.items()
        for scrape in container.get("scrapes", [])
    ]


def monitoring_cluster_scrapes(
    containers: Mapping[str, Any],
    folder: str,
    host: str,
    others: Collection[Mapping[str, str]],
    ports: Mapping[str, object],
    name: str = "",
) -> list[dict[str, Any]]:
    """Return the scrape_configs for host's containers and, by their published ports, for others.

    A container that names its hosts is scraped there alone. In every Prometheus of the cluster a
    target has the same labels, so that an alert has, too.
    ports are the published ones by their variables, others is stack_others. The rest is as
    monitoring_client has it.
    """
    client = monitoring_client(folder, True, True, name)
    known = [(one, scrape) for one in containers.values() for scrape in one.get("scrapes", [])]
    own = monitoring_scrapes(containers, folder, True, True, name)
    configs = []
    for config, (container, scrape) in zip(own, known, strict=True):
        hosts = container.get("hosts", [host, *(one["name"] for one in others)])
        job, (static,) = config["job_name"], config["static_configs"]
        port = ports[scrape["published"]] if "published" in scrape else scrape["port"]
        static["labels"] = {"host": host, "instance": f"{host}:{port}"}
        if host in hosts:
            configs.append(config)
        if "published" in scrape:
            targets = [
                {
                    "targets": [f"{one['name']}:{port}"],
                    "labels": {"host": one["name"], "job": job},
                }
                for one in others
                if one["name"] in hosts
            ]
            asked = {
                key: deepcopy(config[key]) for key in ("metrics_path", "params") if key in config
            }
            more = {"job_name": f"{job}_others", "scheme": "https", "static_configs": targets}
            configs += [asked | deepcopy(client) | more] if targets else []
    return configs


def monitoring_inhibit_rules(
    rules: Iterable[Mapping[str, Any]], clustered: bool
) -> list[dict[str, Any]]:
    """Return Alertmanager's inhibit_rules; in a cluster one says near for what one host has.

    near is this module's own: source and target are then of the same host.
    """
    ready = []
    for rule in rules:
        rest = {key: value for key, value in rule.items() if key != "near"}
        if clustered and rule.get("near"):
            rest["equal"] = [*rule.get("equal", []), "host"]
        ready.append(rest)
    return ready


def monitoring_files(paths: Iterable[str], texts: Iterable[str], folder: str) -> dict[str, str]:
    """Return the texts of paths by the paths that the files get: folder/name."""
    return {
        f"{folder}/{PurePosixPath(path).name}": text
        for path, text in zip(paths, texts, strict=True)
    }


def monitoring_secrets(secrets: Mapping[str, str]) -> dict[str, str]:
    """Return the secrets' texts by their paths in Alertmanager's folder."""
    return {f"secrets/{name}": text for name, text in secrets.items()}


def monitoring_missing_secrets(receivers: object, secrets: Mapping[str, str]) -> list[str]:
    """Return the files that receivers read (`…_file`) and that are none of secrets.

    What the image has below /etc/ssl/ is there.
    """
    read = re.findall(r'"\w+_file": "([^"]*)"', json.dumps(receivers))
    there = {f"{SECRETS}/{name}" for name, text in secrets.items() if text}
    return [path for path in read if not path.startswith("/etc/ssl/") and path not in there]


def monitoring_bad_values(
    given: Mapping[str, object], known: Mapping[str, object], names: Iterable[str] = ()
) -> list[str]:
    """Return what of an alert's given values cannot be used: unknown names, and wrong values.

    Thresholds are for queues of names and for their dead queues.
    """
    forms = dict.fromkeys(("for", "keep", "within"), DURATION)
    forms |= dict.fromkeys(("above", "days", "hours"), NUMBER)
    unknown = [name for name in given if name not in known]
    wrong = [
        str(given[name])
        for name in forms
        if name in given and not forms[name].fullmatch(str(given[name]))
    ]
    queues = given.get("queues", {})
    if not isinstance(queues, Mapping):
        return [*unknown, *wrong, str(queues)]
    there = {f"{name}{end}" for name in names for end in ("", ".dead")}
    unknown += [str(queue) for queue in queues if "queues" in known and queue not in there]
    wrong += [str(above) for above in queues.values() if not NUMBER.fullmatch(str(above))]
    return unknown + wrong


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {
            "monitoring_bad_values": monitoring_bad_values,
            "monitoring_client": monitoring_client,
            "monitoring_cluster_scrapes": monitoring_cluster_scrapes,
            "monitoring_files": monitoring_files,
            "monitoring_inhibit_rules": monitoring_inhibit_rules,
            "monitoring_missing_secrets": monitoring_missing_secrets,
            "monitoring_scrapes": monitoring_scrapes,
            "monitoring_secrets": monitoring_secrets,
            "monitoring_web": monitoring_web,
        }

"""Filters that the role apps computes with."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Entry = Mapping[str, Any]
RIGHTS = ("send", "receive", "manage")
# Characters of the shortest token that nobody guesses; those that are made have 32.
LEAST_TOKEN = 20


def apps_lists(
    queues: Iterable[Entry],
    topics: Iterable[Entry],
    clients: Iterable[Entry],
    tokens: Mapping[str, str],
    origins: Iterable[str] = (),
    readers: Mapping[str, str] | None = None,
) -> str:
    """Return the JSON by which the doors know queues, topics and clients.

    Of a token it has the SHA-256; tokens are the lines of a client's text in tokens. Pages of
    origins may use the doors in a browser. Where there are readers, who see the metrics, it has
    their names and hashes of their passwords.
    """
    lists = {"queues": queues, "topics": topics}
    told: dict[str, list[Any]] = {
        kind: sorted(str(one["name"]) for one in lists[kind]) for kind in lists
    }
    told["clients"] = [
        {
            "name": str(client["name"]),
            "tokens": [_hash(token) for token in tokens[client["name"]].split()],
            **{right: sorted(map(str, client.get(right) or [])) for right in RIGHTS},
        }
        for client in sorted(clients, key=lambda one: str(one["name"]))
    ]
    if origins := sorted(origins):
        told["origins"] = origins
    if readers:
        told["readers"] = [
            {"name": name, "tokens": [_hash(readers[name])]} for name in sorted(readers)
        ]
    return json.dumps(told)


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def apps_token_faults(clients: Iterable[Entry], folder: str) -> list[str]:
    """Return what is wrong with the files of tokens that clients have in folder by now."""
    faults, owners = [], dict[str, str]()
    for client in clients:
        path = Path(folder, f"client_{client['name']}")
        for token in path.read_text().split() if path.is_file() else []:
            if len(token) < LEAST_TOKEN or not token.isascii():
                faults.append(
                    f"{path} has a token that is not of {LEAST_TOKEN} ASCII characters or more;"
                    " write a longer one, or remove the file and one is made."
                )
            if owners.setdefault(token, client["name"]) != client["name"]:
                faults.append(f"{path} has a token of {owners[token]}; write another one.")
    return faults


def apps_brokers(others: Iterable[Mapping[str, str]], port: object) -> str:
    """Return RABBITMQ_OTHERS: the brokers of other hosts, each at port."""
    return ",".join(f"{other['name']}:{port}" for other in others)


def apps_doors(others: Iterable[Mapping[str, str]], port: object) -> str:
    """Return OTHER_DOORS: the subscribers of other hosts by the hosts' names, each at port."""
    return ",".join(f"{other['name']}=https://{other['name']}:{port}" for other in others)


def apps_other_names(
    hostvars: Mapping[str, Entry], others: Iterable[Mapping[str, str]]
) -> list[str]:
    """Return the names and addresses by which clients know the other hosts."""
    return [
        known
        for other in others
        for known in (
            other["name"],
            other["address"],
            str(hostvars[other["name"]].get("ansible_host", other["name"])),
        )
    ]


class FilterModule:
    """What Ansible loads."""

    def filters(self) -> dict[str, Any]:
        """Return the filters by name."""
        return {
            "apps_brokers": apps_brokers,
            "apps_doors": apps_doors,
            "apps_lists": apps_lists,
            "apps_other_names": apps_other_names,
            "apps_token_faults": apps_token_faults,
        }

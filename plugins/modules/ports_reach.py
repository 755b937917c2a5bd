"""Try which ports of other hosts can be reached from this one, and tell the time here."""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: ports_reach
short_description: Try which ports of other hosts can be reached
description: >-
  Connects to each port of each address, all at once, and says nothing there. Tells this host's time
  as well, by which clocks can be compared.
author: The authors of message-broker-stack
attributes:
  check_mode: {support: full, description: It changes nothing.}
options:
  addresses:
    {type: list, elements: str, required: true, description: IPv4 addresses of the other hosts.}
  ports: {type: list, elements: int, required: true, description: Ports of each of them.}
  seconds: {type: float, default: 2, description: For which each may keep silent.}
  asked:
    type: float
    default: 0
    description: The time, as seconds since 1970, by the clock of who asks. Returned as it is.
"""

EXAMPLES = r"""
- message_broker.stack.ports_reach:
    addresses: [192.0.2.2, 192.0.2.3]
    ports: [4369, 25672]
    asked: "{{ now().timestamp() }}"
"""

RETURN = r"""
unreached:
  type: list
  returned: always
  description: >-
    What did not answer, with address, port and why (refused, timed out, or what the system says).
asked: {type: float, returned: always, description: As given.}
began: {type: float, returned: always, description: The time here before it connected.}
ended: {type: float, returned: always, description: The time here after it.}
"""


def fault(address: str, port: int, seconds: float) -> str:
    """Return why port of address cannot be reached, or nothing."""
    try:
        socket.create_connection((address, port), seconds).close()
    except ConnectionRefusedError:
        return "refused"
    except OSError as error:
        return str(error.strerror or error)
    return ""


def unreached(addresses: list[str], ports: list[int], seconds: float) -> list[dict[str, Any]]:
    """Return the ports that cannot be reached, each with address, port and why."""
    tried = list(product(addresses, ports))
    with ThreadPoolExecutor(max_workers=max(len(tried), 1)) as pool:
        faults = list(pool.map(lambda one: fault(one[0], one[1], seconds), tried))
    return [
        {"address": address, "port": port, "why": why}
        for (address, port), why in zip(tried, faults)  # noqa: B905 - Python 3.9 has no strict
        if why
    ]


def main() -> None:
    """Answer Ansible."""
    began = time.time()
    module = AnsibleModule(
        {
            "addresses": {"type": "list", "elements": "str", "required": True},
            "ports": {"type": "list", "elements": "int", "required": True},
            "seconds": {"type": "float", "default": 2},
            "asked": {"type": "float", "default": 0},
        },
        supports_check_mode=True,
    )
    given = module.params
    found = unreached(given["addresses"], given["ports"], given["seconds"])
    module.exit_json(unreached=found, asked=given["asked"], began=began, ended=time.time())


if __name__ == "__main__":
    main()

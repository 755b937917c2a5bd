"""Listen for a moment on ports that nothing holds yet, so that others can try to reach them."""

import errno
import os
import secrets
import socket
from typing import NoReturn

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: ports_listen
short_description: Listen for a moment on ports that nothing holds yet
description: >-
  A process of its own listens, says nothing, and ends when it is told or after some seconds. What
  connects meanwhile learns that the port can be reached.
author: The authors of message-broker-stack
attributes:
  check_mode: {support: full, description: It changes nothing that stays.}
options:
  address: {type: str, description: The IPv4 address of this host. Needed with I(ports).}
  ports:
    type: list
    elements: int
    default: []
    description: On which to listen. One that something else holds is left to that.
  seconds: {type: int, default: 30, description: After which it ends by itself.}
  end: {type: str, description: "The I(listener) that is to end, instead of all this."}
"""

EXAMPLES = r"""
- message_broker.stack.ports_listen:
    address: 192.0.2.1
    ports: [4369, 25672]
  register: listening
- message_broker.stack.ports_listen:
    end: "{{ listening.listener }}"
"""

RETURN = r"""
listener: {type: str, returned: with I(ports), description: By which it can be told to end.}
"""


def listen(address: str, ports: list[int]) -> list[socket.socket]:
    """Return sockets that listen on those of ports that are free; OSError for a wrong address."""
    found = []
    for port in ports:
        one = socket.socket()
        # Connections of a moment ago may still be closing.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((address, port))
            # The kernel lets this many in although nobody accepts them.
            one.listen(64)
        except OSError as error:
            one.close()
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            found.append(one)
    return found


def hold(sockets: list[socket.socket], bell: socket.socket, seconds: int) -> NoReturn:
    """Hold sockets until somebody connects to bell, or for seconds; then end this process."""
    try:
        # Whoever has started the module waits until nobody has its output any more.
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        os.setsid()
        os.chdir("/")
        bell.settimeout(seconds)
        bell.accept()
        for one in sockets:
            one.close()
    finally:
        os._exit(0)


def start(address: str, ports: list[int], seconds: int) -> str:
    """Start a process that listens; return the name by which it is told to end."""
    # Nobody else can guess the name. A process's number might be another one's meanwhile.
    name = f"message-broker-stack-{secrets.token_hex(16)}"
    with socket.socket(socket.AF_UNIX) as bell:
        bell.bind(f"\0{name}")
        bell.listen(1)
        sockets = listen(address, ports)
        if os.fork() == 0:
            hold(sockets, bell, seconds)
        for one in sockets:
            one.close()
    return name


def end(name: str) -> None:
    """Have the process of this name end, and wait until it has; it may have ended already."""
    with socket.socket(socket.AF_UNIX) as bell:
        bell.settimeout(10)
        try:
            bell.connect(f"\0{name}")
            bell.recv(1)
        except (ConnectionRefusedError, ConnectionResetError):
            return


def main() -> None:
    """Answer Ansible."""
    module = AnsibleModule(
        {
            "address": {"type": "str"},
            "ports": {"type": "list", "elements": "int", "default": []},
            "seconds": {"type": "int", "default": 30},
            "end": {"type": "str"},
        },
        required_one_of=[("address", "end")],
        mutually_exclusive=[("address", "end")],
        supports_check_mode=True,
    )
    if module.params["end"]:
        end(module.params["end"])
        module.exit_json()
    address = module.params["address"]
    try:
        name = start(address, module.params["ports"], module.params["seconds"])
    except OSError as error:
        module.fail_json(msg=f"Nothing can listen on {address}: {error.strerror}")
    module.exit_json(listener=name)


if __name__ == "__main__":
    main()

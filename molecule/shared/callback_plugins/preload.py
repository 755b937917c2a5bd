"""Load once what each task would load again: Ansible forks a process for each task and host.

The connection to the scenarios' hosts imports requests and its like, which takes 0.2 s of a core:
more than all the rest that such a process does.
"""

from ansible.plugins.callback import CallbackBase
from ansible.plugins.loader import connection_loader


class CallbackModule(CallbackBase):  # type: ignore[misc]
    """Loads it at the beginning of a run."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "preload"

    def v2_playbook_on_start(self, playbook: object) -> None:  # noqa: ARG002
        """Load the connection; its tasks' processes have it from then on."""
        connection_loader.get("community.docker.docker_api", class_only=True)

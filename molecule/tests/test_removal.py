"""What is left of the stack when it is removed; by its name the last of these files."""

import pytest
from conftest import Stack


@pytest.mark.usefixtures("empty_queue")
def test_down_keeps_the_data_and_clean_leaves_only_what_is_others(stack: Stack) -> None:
    # One of them stands on an image of the stack's, whose labels it inherits.
    borrowed = stack.inspect("rabbitmq")["Config"]["Image"]
    stack.docker("run", "--detach", "--name", "foreign", "--entrypoint", "sleep", borrowed, "3600")
    stack.docker("volume", "create", "foreign")
    dockerfile = "FROM scratch\nCOPY daemon.json /\n"
    stack.run(f"printf '{dockerfile}' | docker build --tag foreign --file - /etc/docker")

    assert stack.playbook("down").returncode == 0
    assert stack.docker("ps", "--format", "{{.Names}}").split() == ["foreign"]
    assert stack.name not in stack.docker("network", "ls", "--format", "{{.Name}}").split()
    # That a message and a password survive it, the bare machine shows.
    stack.docker("volume", "inspect", stack.container("rabbitmq"))
    assert stack.secrets.exists()
    assert "message-broker-stack" not in stack.run("iptables -S")
    logs = stack.vars["fluentd_log_dir"]
    assert "subscriber" in stack.run("ls %s", logs)

    result = stack.playbook("clean")
    assert result.returncode == 0, result.stdout[-3000:]
    label = f"label=message-broker-stack={stack.name}"
    for kind in ["ps", "--all"], ["volume", "ls"], ["network", "ls"]:
        assert stack.docker(*kind, "--quiet", "--filter", label) == "", kind
    ours = f"label=message-broker-stack.image={stack.name}"
    assert stack.docker(
        "images", "--filter", ours, "--format", "{{.Repository}}:{{.Tag}}"
    ).split() == [borrowed]
    assert stack.docker("ps", "--format", "{{.Names}}").split() == ["foreign"]
    assert "foreign" in stack.docker("volume", "ls", "--quiet").split()
    assert "foreign" in stack.docker("images", "--format", "{{.Repository}}").split()
    assert not stack.secrets.exists()
    assert stack.host.run("ls -d %s /etc/tmpfiles.d/message-broker-stack*", logs).stdout == ""
    assert stack.run("ls /etc/message-broker-stack /var/lib/message-broker-stack").split() == [
        "/etc/message-broker-stack:",
        "/var/lib/message-broker-stack:",
    ]

"""Containers as closed as DESIGN says, by inspection."""

import pytest
from conftest import SERVICES, Stack


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_can_do_little(stack: Stack, service: str) -> None:
    container = stack.inspect(service)
    host = container["HostConfig"]
    assert container["Config"]["User"] not in ("", "root", "0", "0:0")
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert not host["CapAdd"]
    assert host["Privileged"] is False
    assert any(option.startswith("no-new-privileges") for option in host["SecurityOpt"])
    assert host["Memory"] > 0
    assert host["PidsLimit"] > 0
    assert host["RestartPolicy"]["Name"] == "unless-stopped"


@pytest.mark.parametrize("service", SERVICES)
def test_a_containers_main_process_is_not_root(stack: Stack, service: str) -> None:
    pid = stack.inspect(service)["State"]["Pid"]
    status = stack.run("cat /proc/%s/status", str(pid))
    uids = next(line.split()[1:] for line in status.splitlines() if line.startswith("Uid:"))
    assert "0" not in uids
    assert "CapEff:\t0000000000000000" in status


@pytest.mark.parametrize("service", SERVICES)
def test_no_password_is_seen_by_inspection(stack: Stack, service: str) -> None:
    passwords = [file.read_text().strip() for file in stack.secrets.glob("rabbitmq_*")]
    assert len(passwords) == 4
    inspected = str(stack.inspect(service))
    assert not any(password in inspected for password in passwords)


def test_passwords_lie_where_only_their_owner_reads_them(stack: Stack) -> None:
    assert stack.secrets.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in stack.secrets.iterdir()} == {0o600}
    files = stack.run("find /etc/message-broker-stack -type f -perm /o+rwx")
    assert files == ""


def test_configurations_and_logs_are_read_by_the_stack_s_group_alone(stack: Stack) -> None:
    folders = "/etc/message-broker-stack", stack.vars["fluentd_log_dir"]
    files = stack.run("find %s %s -type f -printf '%%m %%g\\n'", *folders)
    assert set(files.splitlines()) == {"640 message-broker-stack"}
    # Nobody's of the host, by its number or its name.
    assert stack.run("stat --format '%%a %%U %%G' %s", folders[1]).split()[::2] == [
        "750",
        "message-broker-stack",
    ]


def test_each_stack_has_an_erlang_cookie_of_its_own(stack: Stack) -> None:
    image = stack.inspect("rabbitmq")["Config"]["Image"]
    assert (
        stack.docker("run", "--rm", image, "find", "/var/lib/rabbitmq", "-name", ".erlang.cookie")
        == ""
    )

"""Reads the commands that README.md shows, so that tests can run them as they stand there.

The contract: under the heading "## Try it", in blocks fenced as ```sh, a line that starts with `$ `
is a command (continued by a backslash at its end), and the lines up to the next command are what it
prints; … is any text.
"""

import re
import time
from collections.abc import Callable

HEADING = "## Try it"


def walkthrough(text: str) -> list[tuple[str, str]]:
    """Return (command, expected output) for each command under HEADING, in order."""
    section = re.search(rf"^{re.escape(HEADING)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    if section is None:
        raise ValueError(f"There is no heading {HEADING!r}.")
    steps: list[tuple[str, str]] = []
    for block in re.findall(r"^```sh\n(.*?)^```$", section[1], re.MULTILINE | re.DOTALL):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = part.splitlines()
            command = [lines.pop(0)]
            while command[-1].endswith("\\"):
                command.append(lines.pop(0))
            steps.append(("\n".join(command), "\n".join(lines).strip()))
    return steps


def commands(text: str, heading: str) -> str:
    """Return the first block that is fenced as ```sh under heading."""
    found = re.search(
        rf"^{re.escape(heading)}$.*?^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL
    )
    if found is None:
        raise ValueError(f"There are no commands under {heading!r}.")
    return found[1]


def matches(expected: str, actual: str) -> bool:
    """Return whether actual is expected, in which … stands for any text, of no or many lines."""
    plain = "\n".join(line.rstrip() for line in actual.splitlines()).strip()
    pattern = ".*".join(re.escape(part) for part in expected.strip().split("…"))
    return re.fullmatch(pattern, plain, re.DOTALL) is not None


def follow(command: str, expected: str, run: Callable[[str], str]) -> None:
    """Check that command, by run, prints what is expected.

    One that only looks at numbers or files has 15 seconds: the broker counts every 5 seconds, and a
    line is in its file within 10.
    """
    patient = command.startswith(("curl --silent", "ls"))
    deadline = time.monotonic() + (15 if patient else 0)
    while not matches(expected, actual := run(command)):
        assert time.monotonic() < deadline, f"$ {command}\n{actual[-3000:]}\nexpected:\n{expected}"
        time.sleep(0.5)

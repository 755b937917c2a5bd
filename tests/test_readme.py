"""The reader of README.md's walk-through does what its contract says."""

import pytest
from readme import commands, matches, walkthrough

TEXT = """# Title
```sh
$ not under the heading
```
## Try it
Some words, then `$ not in a block`.
```sh
$ make up
```
```sh
$ curl -s \\
    localhost
one
two …

$ curl again
```
```json
$ not sh
```
## Next
```sh
$ not under the heading
```
"""


def test_commands_and_what_they_print_are_read_in_order() -> None:
    assert walkthrough(TEXT) == [
        ("make up", ""),
        ("curl -s \\\n    localhost", "one\ntwo …"),
        ("curl again", ""),
    ]


def test_the_first_block_under_a_heading_is_read_whole() -> None:
    text = "## One\n```sh\na\n```\n## Two\nwords\n```sh\nb\nc\n```\n```sh\nd\n```\n"
    assert commands(text, "## Two") == "b\nc\n"
    with pytest.raises(ValueError, match="## Three"):
        commands(text, "## Three")


def test_a_text_without_the_heading_is_an_error() -> None:
    with pytest.raises(ValueError, match="## Try it"):
        walkthrough("# Title\n")


@pytest.mark.parametrize(
    ("expected", "actual"),
    [
        ("one", "one\n"),
        ("HTTP/1.1 201 CREATED\n…\n\nok", "HTTP/1.1 201 CREATED\r\nServer: x\r\nB: c\r\n\r\nok"),
        ('{"id": …}', '{"id": 5}\n'),
        ("…", ""),
        ("", "\n"),
    ],
)
def test_output_as_shown_matches(expected: str, actual: str) -> None:
    assert matches(expected, actual)


@pytest.mark.parametrize(
    ("expected", "actual"),
    [("one", "one two"), ("a.c", "abc"), ('{"id": …}', "[]"), ("", "something"), ("one", "")],
)
def test_other_output_does_not_match(expected: str, actual: str) -> None:
    assert not matches(expected, actual)

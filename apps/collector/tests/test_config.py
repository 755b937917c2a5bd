"""What fluent.conf may say, and how the collector refuses the rest."""

import contextlib
from pathlib import Path

import pytest
from collector.config import (
    Config,
    ConfigError,
    ExecSource,
    FileMatch,
    ForwardSource,
    HttpSource,
    MonitorSource,
    Pattern,
    load,
)
from hypothesis import given, settings
from hypothesis import strategies as st

NAMED = r"<match /\A(rabbitmq|publisher|subscriber|exporter|prometheus|alertmanager|alerts)\z/>"


def read(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "fluent.conf"
    path.write_text(text)
    return load(path)


def test_the_roles_configuration_is_known(tmp_path: Path, fluent_conf: str) -> None:
    config = read(tmp_path, fluent_conf)
    forward, http, monitor, command = config.sources
    assert forward == ForwardSource("", "0.0.0.0", 24224, 1 << 20)
    assert http == HttpSource("", "0.0.0.0", 9880, 1 << 20)
    assert monitor == MonitorSource("", "0.0.0.0", 24220)
    assert command == ExecSource("@FLUENT_LOG", "fluent.prune", "sh /fluentd/etc/prune.sh", 2.0)
    known, other = config.matches[""]
    assert isinstance(known, FileMatch)
    assert isinstance(other, FileMatch)
    assert (known.id, other.id) == ("files", "other")
    assert known.buffer.by_tag
    assert not other.buffer.by_tag
    assert known.buffer.total_limit_size == 64 << 20
    assert known.buffer.flush_interval == 5.0


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("file_permission 0640", "", "line 2: <system>: file_permission must be given"),
        ("file_permission 0640", "file_permission 0644", "file_permission can only be 0640"),
        ("port 24224", "port many", "line 11: <source>: port must be a whole number"),
        ("port 24224", "prot 24224", "line 11: <source>: unknown parameter prot"),
        ("@type forward", "@type tail", "line 9: <source>: @type must be one of forward"),
        ("chunk_size_limit 1m", "chunk_size_limit 1q", "chunk_size_limit must be a size"),
        ("port 24220", "port 24220\n  tag x", "line 28: <source>: unknown parameter tag"),
        ("include_config false", "include_config true", "include_config can only be false"),
        ("@id files", "@id", "@id must be a word, not ''"),
        ("@id files", "@id a.b/c", "@id must be a word, not 'a.b/c'"),
        ("@id other", "@id files", "<match **>: @id files is another section's too"),
        ("bind 0.0.0.0", "@id other", "line 10: <source>: @id other is another section's too"),
        ("run_interval 2s", "", "<source>: run_interval must be given"),
        ("@label @FLUENT_LOG\n", "@label @OTHER\n", "@label @OTHER has no <label @OTHER>"),
        ("<parse>", "<prase>", "</parse> ends no section"),
        ("  <parse>\n    @type none\n  </parse>", "", "needs <parse>"),
        ("<label @FLUENT_LOG>", "<lable x>", "</label> ends no section"),
        ("append true", "append false", "append can only be true"),
        ("append true", "append true\n  append true", "append is given twice"),
        ("@type out_file", "@type json", "<format>: @type can only be out_file"),
        ("%3N%:z", "%3N%Z", "time_format knows"),
        ("flush_mode interval", "flush_mode lazy", "flush_mode can only be interval"),
        ("timekey 1d", "timekey 1h", "timekey can only be 1d"),
        ("retry_forever true", "retry_forever false", "retry_forever can only be true"),
        ("flush_interval 5s", "flush_interval often", "flush_interval must be a time"),
        ("buffer-other.*.log", "buffer.*.log", "is another buffer's too"),
        ("<buffer tag,time>", "<buffer time>", "<buffer tag,time> is needed"),
        ("<buffer tag,time>", "<buffer tag,host>", "can only be <buffer time>"),
        (NAMED, "<match ** rabbitmq>", "the match must name each tag"),
        (NAMED, "<match .. rabbitmq>", "the match must name each tag"),
        (NAMED, "<match a/b rabbitmq>", "the pattern 'a/b' is not known here"),
        (NAMED, r"<match /\A(rabbitmq|.*)\z/>", r"the pattern '/\\A(rabbitmq|.*)\\z/' is not"),
        (NAMED, r"<match /\A(rabbitmq)\Z/>", r"the pattern '/\\A(rabbitmq)\\Z/' is not known here"),
        ("<filter **>", "<filter rabbitmq>", "can only be <filter **>"),
        ("record_transformer", "grep", "@type can only be record_transformer"),
        ("scrub!", "reverse!", "<record>: _ can only be ${record.each_value"),
        ("<match **>", "<match>", "needs the tags"),
        ("log/other.%Y%m%d", "log/other.%Y", "path needs %Y%m%d"),
        ("log/other.%Y%m%d", "log/${chunk_id}.%Y%m%d", "path needs %Y%m%d"),
        ("<source>\n  @type http", "<filter **>\n  @type http", "</source> ends no section"),
        (
            "</match>\n\n<match **>",
            "</match>\n<worker 0>\n</worker>\n<match **>",
            "<worker 0>: unknown",
        ),
        ("# Tags that", "@include other.conf\n# Tags that", "unknown parameter @include"),
        ("command sh ", 'command "sh #{x}" # ', "embedded Ruby"),
        ("command sh ", "command 'sh ", "quotes that do not end"),
    ],
)
def test_what_is_not_known_is_refused_by_name_and_line(
    tmp_path: Path, fluent_conf: str, old: str, new: str, words: str
) -> None:
    assert old in fluent_conf
    with pytest.raises(ConfigError, match=r"fluent.conf line \d+: ") as refused:
        read(tmp_path, fluent_conf.replace(old, new, 1))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_section_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 2: <source> has no end"):
        read(tmp_path, "\n<source>\n  @type forward\n")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere cannot be read"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("true # always", "true"),
        ("echo a#b", "echo a#b"),
        ('"echo # \\"x\\"\\ty" # comment', 'echo # "x"\ty'),
        ("'it''", None),
        (r"'it\'s'", "it's"),
    ],
)
def test_values_are_read_as_fluentd_reads_them(
    tmp_path: Path, fluent_conf: str, written: str, meant: str | None
) -> None:
    text = fluent_conf.replace("sh /fluentd/etc/prune.sh", written)
    if meant is None:
        with pytest.raises(ConfigError):
            read(tmp_path, text)
    else:
        command = read(tmp_path, text).sources[3]
        assert isinstance(command, ExecSource)
        assert command.command == meant


@pytest.mark.parametrize(
    ("pattern", "tags", "others"),
    [
        (r"/\A(a|b-c)\z/", ["a", "b-c"], ["a|b-c", "", "a\n", "a.b", "b"]),
        ("a b", ["a", "b"], ["a b", "ab", "", "a\n", "a.b"]),
        ("a.*", ["a.b", "a."], ["a", "a.b.c"]),
        ("a.**", ["a", "a.b", "a.b.c"], ["ab", "b.a"]),
        ("**.a", ["a", "b.a", "c.b.a"], ["ba", "a.b"]),
        ("**", ["", "a", "a.b", "a\nb", "../../x"], []),
        ("fluent.**", ["fluent.info"], ["fluentd"]),
    ],
)
def test_patterns_match_as_fluentds(pattern: str, tags: list[str], others: list[str]) -> None:
    assert [tag for tag in tags if not Pattern(pattern).matches(tag)] == []
    assert [tag for tag in others if Pattern(pattern).matches(tag)] == []


@settings(derandomize=True, deadline=None, max_examples=300)
@given(st.data())
def test_any_text_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, fluent_conf: str, data: st.DataObject
) -> None:
    odd = st.text(st.sampled_from("<>/@# \"'\\${}[]*%abm1\t"), max_size=12)
    line = st.sampled_from(fluent_conf.splitlines()) | odd
    path = tmp_path_factory.getbasetemp() / "fuzzed.conf"
    path.write_text("\n".join(data.draw(st.lists(line, max_size=20))))
    with contextlib.suppress(ConfigError):
        load(path)

"""fluent.conf: the part of Fluentd's v1 grammar that the collector knows; all else is refused.

The grammar is https://docs.fluentd.org/configuration/config-file. A parameter that has no default
here, or that must have the one value named, is one whose default in Fluentd would ask for
something that the collector does not do.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

LABEL_FLUENT_LOG = "@FLUENT_LOG"
DAY = 86400
_ROOT = ""


class ConfigError(ValueError):
    """fluent.conf cannot be used; the text names file, line, section and parameter."""


@dataclass
class Section:
    """A section as it was read: `<name argument>`, its parameters and the sections in it."""

    name: str
    argument: str
    line: int
    parameters: dict[str, tuple[str, int]] = field(default_factory=dict)
    sections: list["Section"] = field(default_factory=list)

    def __str__(self) -> str:
        """Return the section's first line."""
        return f"<{self.name} {self.argument}>" if self.argument else f"<{self.name}>"


@dataclass(frozen=True)
class Source:
    """What all inputs have: the label whose matches get its events (empty: those of no label)."""

    label: str


@dataclass(frozen=True)
class ForwardSource(Source):
    """`@type forward`; chunk_size_limit is the most bytes of one message."""

    bind: str
    port: int
    chunk_size_limit: int


@dataclass(frozen=True)
class HttpSource(Source):
    """`@type http`; body_size_limit in bytes."""

    bind: str
    port: int
    body_size_limit: int


@dataclass(frozen=True)
class MonitorSource(Source):
    """`@type monitor_agent`: tells of the outputs."""

    bind: str
    port: int


@dataclass(frozen=True)
class ExecSource(Source):
    """`@type exec`; run_interval in seconds."""

    tag: str
    command: str
    run_interval: float


@dataclass(frozen=True)
class Buffer:
    """`<buffer tag,time>` or `<buffer time>`; intervals in seconds, sizes in bytes."""

    by_tag: bool
    path: str
    flush_interval: float
    chunk_limit_size: int
    total_limit_size: int
    retry_max_interval: float


@dataclass(frozen=True)
class FileMatch:
    """`@type file`: path has `%Y%m%d` and, with a buffer by tag, `${tag}`; id may be empty."""

    pattern: "Pattern"
    path: str
    time_format: str
    buffer: Buffer
    id: str = ""


@dataclass(frozen=True)
class StdoutMatch:
    """`@type stdout`: the collector's own log."""

    pattern: "Pattern"


Match = FileMatch | StdoutMatch


@dataclass(frozen=True)
class Config:
    """The whole file: inputs, and under each label (the empty one is the root) its matches."""

    sources: list[Source]
    matches: dict[str, list[Match]]


class Pattern:
    r"""The tags of a match: `/\A(one|other)\z/`, or patterns with spaces between them.

    In a pattern `*` is one part of a tag and `**` any number of them.
    """

    def __init__(self, text: str) -> None:
        """Read text; ValueError when a pattern of it has a character that is not known here."""
        if not text:
            raise ValueError("a match needs the tags that it matches")
        if named := re.fullmatch(r"/\\A\(([\w|-]+)\)\\z/", text, re.ASCII):
            text = named[1].replace("|", " ")
        for pattern in text.split():
            if not re.fullmatch(r"[\w.*-]+", pattern, re.ASCII):
                raise ValueError(f"the pattern {pattern!r} is not known here")
        self._text = text
        # fullmatch: Ruby's \Z, which Fluentd ends with, would let a newline pass after the tag.
        self._regex = re.compile("|".join(map(self._translate, text.split())), re.DOTALL)

    @staticmethod
    def _translate(pattern: str) -> str:
        """Return the regular expression of one pattern, as Fluentd reads it: a.** matches a too."""
        regex = re.escape(pattern)
        regex = regex.replace(r"\*\*\.", "<front>").replace(r"\.\*\*", "<end>")
        regex = regex.replace(r"\*\*", ".*").replace(r"\*", r"[^.]*")
        return regex.replace("<front>", r"(?:.*\.)?").replace("<end>", r"(?:\..*)?")

    def names(self) -> list[str] | None:
        """Return the tags when none of them has a wildcard, else None."""
        return None if "*" in self._text else self._text.split()

    def matches(self, tag: str) -> bool:
        """Return whether tag is one of them."""
        return self._regex.fullmatch(tag) is not None


# --- values ------------------------------------------------------------------------------------

Read = Callable[[str], Any]
_SIZES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": DAY}
_TIME_PARTS = r"%(?:[YmdHMSz%LN]|:z|[369]N)"
SUBSECONDS = re.compile(r"%([369]?)N|%L")


def _text(value: str) -> str:
    if not value:
        raise ValueError("must not be empty")
    return value


def _whole(low: int, high: int) -> Read:
    def read(value: str) -> int:
        if not re.fullmatch(r"\d{1,9}", value, re.ASCII) or not low <= int(value) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(value)

    return read


def _size(value: str) -> int:
    found = re.fullmatch(r"([1-9]\d{0,9})([kmgt]?)", value.lower(), re.ASCII)
    if not found:
        raise ValueError("must be a size in bytes as 512, 8k, 8m or 1g")
    return int(found[1]) * _SIZES[found[2]]


def _seconds(value: str) -> float:
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd]?)", value, re.ASCII)
    if not found or not float(found[1]):
        raise ValueError("must be a time as 5, 5s, 1m, 1h or 1d")
    return float(found[1]) * _SECONDS[found[2]]


def _only(value: str) -> Read:
    def read(given: str) -> str:
        if given != value:
            raise ValueError(f"can only be {value}")
        return given

    return read


def _day(value: str) -> None:
    if _seconds(value) != DAY:
        raise ValueError("can only be 1d")


def _time_format(value: str) -> str:
    rest = re.sub(_TIME_PARTS, "", value)
    if "%" in rest or len(SUBSECONDS.findall(value)) > 1:
        raise ValueError("knows %Y %m %d %H %M %S %z %:z and one of %L %N %3N %6N %9N")
    return value


def _path(value: str) -> str:
    rest = value.replace("${tag}", "").replace("%Y%m%d", "", 1)
    if "%Y%m%d" not in value or re.search(r"[%*]|\$\{", rest):
        raise ValueError("needs %Y%m%d and knows ${tag} besides, no other placeholder")
    return value


def _buffer_path(value: str) -> str:
    if not re.fullmatch(r"[^*]*[^*/]\.\*\.[^*/]+", value):
        raise ValueError("must be like /folder/buffer.*.log")
    return value


# --- sections ----------------------------------------------------------------------------------

# name: (reader, default); None stands for "must be given". Defaults are Fluentd's, unless it has
# no limit where the collector needs one.
Schema = dict[str, tuple[Read, str | None]]

_PORT = _whole(1, 65535)
_SYSTEM: Schema = {
    "file_permission": (_only("0640"), None),
    "dir_permission": (_only("0750"), None),
}
_FORWARD: Schema = {
    "bind": (_text, "0.0.0.0"),
    "port": (_PORT, "24224"),
    "chunk_size_limit": (_size, "8m"),
}
_HTTP: Schema = {
    "bind": (_text, "0.0.0.0"),
    "port": (_PORT, "9880"),
    "body_size_limit": (_size, "32m"),
}
_MONITOR: Schema = {
    "bind": (_text, "0.0.0.0"),
    "port": (_PORT, "24220"),
    "include_config": (_only("false"), "false"),
}
_EXEC: Schema = {
    "tag": (_text, None),
    "command": (_text, None),
    "run_interval": (_seconds, None),
}
_FILE: Schema = {"path": (_path, None), "append": (_only("true"), None)}
_FORMAT: Schema = {
    "@type": (_only("out_file"), "out_file"),
    "time_format": (_time_format, "%Y-%m-%dT%H:%M:%S%:z"),
}
_PARSE: Schema = {"@type": (_only("none"), None)}
# The one filter that is known: it makes U+FFFD of bytes that are no UTF-8, as to_bytes does anyway.
_FILTER: Schema = {
    "@type": (_only("record_transformer"), None),
    "enable_ruby": (_only("true"), None),
    "remove_keys": (_only("_"), None),
}
_SCRUB = (
    '${record.each_value { |value| value.force_encoding("UTF-8").scrub! if value.is_a?(String) }}'
)
_RECORD: Schema = {"_": (_only(_SCRUB), None)}
_BUFFER: Schema = {
    "@type": (_only("file"), "file"),
    "path": (_buffer_path, None),
    "timekey": (_day, "1d"),
    "timekey_use_utc": (_only("true"), None),
    "flush_mode": (_only("interval"), None),
    "flush_interval": (_seconds, "60s"),
    "flush_at_shutdown": (_only("true"), None),
    "chunk_limit_size": (_size, "256m"),
    "total_limit_size": (_size, "64g"),
    "retry_forever": (_only("true"), None),
    "retry_max_interval": (_seconds, None),
}


def parse(text: str, name: str) -> Section:
    """Return the file's sections under one without a name; errors call the file name."""
    root = Section(_ROOT, "", 0)
    path = [root]
    for number, raw in enumerate(text.splitlines(), 1):
        # A comment begins a line or follows a space; within quotes it does neither.
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        where = f"{name} line {number}"
        if end := re.fullmatch(r"</\s*(\w+)\s*>(?:\s*#.*)?", line):
            if end[1] != path[-1].name:
                raise ConfigError(f"{where}: </{end[1]}> ends no section that is open there")
            path.pop()
        elif start := re.fullmatch(r"<(\w+)(?:\s+([^<>]*?))?\s*>(?:\s*#.*)?", line):
            section = Section(start[1], start[2] or "", number)
            path[-1].sections.append(section)
            path.append(section)
        elif line.startswith("<"):
            raise ConfigError(f"{where}: {line!r} is neither the start nor the end of a section")
        else:
            key, _, rest = line.replace("\t", " ").partition(" ")
            if key in path[-1].parameters:
                raise ConfigError(f"{where}: {path[-1]}: {key} is given twice")
            try:
                value = _literal(line[len(key) :].strip() if rest else "")
            except ValueError as error:
                raise ConfigError(f"{where}: {path[-1]}: {key} {error}") from None
            path[-1].parameters[key] = (value, number)
    if len(path) > 1:
        raise ConfigError(f"{name} line {path[-1].line}: {path[-1]} has no end")
    return root


def _literal(text: str) -> str:
    """Return the value that text writes: bare (up to ` #`), in '…' or in "…"."""
    if text[:1] in {"[", "{"}:
        raise ValueError("has a JSON value, which is not known here")
    if text[:1] not in {"'", '"'}:
        return re.sub(r"(?:^|\s+)#.*$", "", text)
    quote = text[0]
    found = re.fullmatch(rf"{quote}((?:[^{quote}\\]|\\.)*){quote}\s*(?:#.*)?", text)
    if not found:
        raise ValueError("has quotes that do not end with the line")
    if quote == "'":
        return re.sub(r"\\(['\\])", r"\1", found[1])
    if "#{" in found[1]:
        raise ValueError("has embedded Ruby, which is not known here")
    escapes = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "b": "\b", "0": "\0"}
    return re.sub(r"\\(.)", lambda match: escapes.get(match[1], match[1]), found[1])


class _Check:
    """Turns sections into a Config, refusing what is not known by name and line."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._buffers: set[str] = set()
        self._ids: set[str] = set()

    def _fail(self, section: Section, text: str, line: int | None = None) -> NoReturn:
        place = f"{section}: " if section.name != _ROOT else ""
        raise ConfigError(f"{self._name} line {line or section.line}: {place}{text}")

    def _values(self, section: Section, schema: Schema) -> dict[str, Any]:
        for key, (_, line) in section.parameters.items():
            if key not in schema:
                self._fail(section, f"unknown parameter {key}", line)
        values = {}
        for key, (read, default) in schema.items():
            value, line = section.parameters.get(key, (default, section.line))
            if value is None:
                self._fail(section, f"{key} must be given")
            try:
                values[key] = read(value)
            except ValueError as error:
                self._fail(section, f"{key} {error}, not {value!r}", line)
        return values

    def _sections(self, section: Section, *known: str) -> Iterator[Section]:
        for child in section.sections:
            if child.name not in known:
                self._fail(child, "unknown section here")
            yield child

    def _children(self, section: Section, *known: str) -> dict[str, Section]:
        """Return the sections within by name, at most one of each."""
        children: dict[str, Section] = {}
        for child in self._sections(section, *known):
            if child.name in children:
                self._fail(child, "given twice")
            children[child.name] = child
        return children

    def _type(self, section: Section, known: dict[str, Schema]) -> tuple[str, dict[str, Any]]:
        """Return the section's @type and its values by that type's schema."""
        name, line = section.parameters.pop("@type", ("", section.line))
        if name not in known:
            self._fail(section, f"@type must be one of {', '.join(known)}, not {name!r}", line)
        return name, self._values(section, known[name])

    def _id(self, section: Section) -> str:
        """Return the section's @id, which no other one may have; empty without one."""
        if "@id" not in section.parameters:
            return ""
        name, line = section.parameters.pop("@id")
        if not re.fullmatch(r"[\w-]+", name, re.ASCII):
            self._fail(section, f"@id must be a word, not {name!r}", line)
        if name in self._ids:
            self._fail(section, f"@id {name} is another section's too", line)
        self._ids.add(name)
        return name

    def config(self, root: Section) -> Config:
        self._values(root, {})
        sources, matches = [], {_ROOT: self._matches(root, "system", "source", "filter", "label")}
        for section in self._sections(root, "system", "source", "filter", "match", "label"):
            if section.name == "system":
                self._values(section, _SYSTEM)
                self._children(section)
            elif section.name == "source":
                sources.append((section, self._source(section)))
            elif section.name == "filter":
                self._filter(section)
            elif section.name == "label":
                if section.argument in matches or not re.fullmatch(r"@\w+", section.argument):
                    self._fail(section, "needs a name of its own as @NAME")
                self._values(section, {})
                matches[section.argument] = self._matches(section)
        for section, source in sources:
            if source.label not in matches:
                self._fail(section, f"@label {source.label} has no <label {source.label}>")
        if not sources:
            raise ConfigError(f"{self._name}: there is no <source>")
        return Config([source for _, source in sources], matches)

    def _source(self, section: Section) -> Source:
        label, _ = section.parameters.pop("@label", (_ROOT, section.line))
        if section.argument:
            self._fail(section, "takes no argument")
        self._id(section)
        known = {"forward": _FORWARD, "http": _HTTP, "monitor_agent": _MONITOR, "exec": _EXEC}
        kind, values = self._type(section, known)
        if kind == "exec":
            children = self._children(section, "parse")
            if "parse" not in children:
                self._fail(section, "needs <parse> with @type none")
            self._values(children["parse"], _PARSE)
            return ExecSource(label=label, **values)
        self._children(section)
        if kind == "http":
            return HttpSource(label=label, **values)
        if kind == "monitor_agent":
            return MonitorSource(label, values["bind"], values["port"])
        return ForwardSource(label=label, **values)

    def _filter(self, section: Section) -> None:
        if section.argument != "**":
            self._fail(section, "can only be <filter **>")
        self._values(section, _FILTER)
        children = self._children(section, "record")
        if "record" not in children:
            self._fail(section, "needs <record>")
        self._values(children["record"], _RECORD)

    def _matches(self, section: Section, *others: str) -> list[Match]:
        return [
            self._match(child)
            for child in self._sections(section, "match", *others)
            if child.name == "match"
        ]

    def _match(self, section: Section) -> Match:
        try:
            pattern = Pattern(section.argument)
        except ValueError as error:
            self._fail(section, str(error))
        line = section.parameters.get("path", ("", section.line))[1]
        name = self._id(section)
        kind, values = self._type(section, {"file": _FILE, "stdout": {}})
        if kind == "stdout":
            self._children(section)
            return StdoutMatch(pattern)
        children = self._children(section, "format", "buffer")
        if "buffer" not in children:
            self._fail(section, "needs <buffer>")
        buffer = self._buffer(children["buffer"])
        names = pattern.names()
        if "${tag}" in values["path"]:
            if not buffer.by_tag:
                self._fail(section, "path has ${tag}, so <buffer tag,time> is needed", line)
            # A tag is the sender's word: "../../x" would name a file outside the folder.
            if names is None or any(name.startswith(".") for name in names):
                self._fail(section, "path has ${tag}, so the match must name each tag", line)
        form = self._values(children.get("format", Section("format", "", line)), _FORMAT)
        return FileMatch(pattern, values["path"], form["time_format"], buffer, name)

    def _buffer(self, section: Section) -> Buffer:
        keys = {key.strip() for key in section.argument.split(",")}
        if keys not in ({"time"}, {"tag", "time"}):
            self._fail(section, "can only be <buffer time> or <buffer tag,time>")
        values = self._values(section, _BUFFER)
        if values["path"] in self._buffers:
            self._fail(section, f"path {values['path']} is another buffer's too")
        self._buffers.add(values["path"])
        names = Buffer.__dataclass_fields__.keys() - {"by_tag"}
        return Buffer(by_tag="tag" in keys, **{name: values[name] for name in names})


def load(path: Path) -> Config:
    """Return the configuration in path; ConfigError when it cannot be read or is not known."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    return _Check(str(path)).config(parse(text, str(path)))

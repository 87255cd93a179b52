"""What the command line prints: tables and timelines for people, JSON for programs.

JSON is the protobuf JSON form of the API's own messages (field names in lowerCamelCase, enums by name, times in RFC
3339), the same that the HTTP API speaks, so it is as stable as the API. Lists are one object with the collection's
name, whole unless a part was asked for, without page tokens. Text for people may change at any time and goes to
standard output; errors and remarks go to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.table import Table
from rich.text import Text

_PIPE_COLUMNS = 10_000


class Output(StrEnum):
    """The two forms of output."""

    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a list: its heading and how to get the cell from a resource."""

    heading: str
    cell: Callable[[Any], str]


@dataclass(frozen=True, slots=True)
class Printer:
    """Prints in the form that was asked for."""

    output: Output
    console: Console
    errors: Console

    @property
    def is_json(self) -> bool:
        """Whether a program reads."""
        return self.output is Output.JSON

    def resource(
        self, message: Message, *, hidden: frozenset[str] = frozenset(), texts: Mapping[str, str] | None = None
    ) -> None:
        """One resource: all fields that are set, one a line; `texts` has people's words for some."""
        if self.is_json:
            self.json(MessageToDict(message))
            return
        grid = Table(box=None, show_header=False, pad_edge=False)
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, text in _lines(message, "", hidden):
            grid.add_row(name, Text((texts or {}).get(name, text)))
        self.console.print(grid)

    def resources(self, collection: str, messages: Sequence[Message], columns: Sequence[Column]) -> None:
        """A list, in the order given."""
        if self.is_json:
            self.json({collection: [MessageToDict(message) for message in messages]})
            return
        self.table([column.heading for column in columns], ([c.cell(m) for c in columns] for m in messages))

    def table(self, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table of cells; text from elsewhere is printed as it is, never as markup."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in headings:
            table.add_column(heading, overflow="fold")
        count = 0
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
            count += 1
        if count:
            self.console.print(table)
        else:
            self.remark("Nothing there.")

    def json(self, value: Any) -> None:
        """Any value as JSON, indented."""
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def json_line(self, value: Any) -> None:
        """A part of a stream as one line of JSON, seen at once; people do not get it."""
        if self.is_json:
            sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
            sys.stdout.flush()

    def say(self, text: str, style: str = "") -> None:
        """A line for people; programs do not get it."""
        if not self.is_json:
            self.console.print(Text(printable(text)), style=style or None, soft_wrap=True)

    def remark(self, text: str, style: str = "") -> None:
        """A line on standard error."""
        self.errors.print(Text(printable(text)), style=style or None, soft_wrap=True)


def make_printer(output: Output) -> Printer:
    """A printer on standard output and standard error."""
    console = Console(highlight=False)
    if not console.is_terminal:
        # Nobody sees the right edge of a pipe or file: a row is a line, for grep and awk, however long it is.
        console = Console(highlight=False, width=_PIPE_COLUMNS)
    return Printer(output, console, Console(stderr=True, highlight=False))


def printable(text: str) -> str:
    """The text without control characters: replies and subjects come from strangers, and terminals obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def short(name: str) -> str:
    """The last part of a resource name."""
    return name.rpartition("/")[2]


def time_text(value: Timestamp) -> str:
    """Local time to the second, empty when absent."""
    return _moment(value).strftime("%Y-%m-%d %H:%M:%S") if value.seconds else ""


def clock_text(value: Timestamp) -> str:
    """Local time of day to the millisecond."""
    return _moment(value).strftime("%H:%M:%S.%f")[:-3]


def enum_text(message: Message, field: str) -> str:
    """An enum's value as people say it: STATE_ACTIVE is `active`."""
    descriptor = message.DESCRIPTOR.fields_by_name[field]
    return _enum_words(descriptor, getattr(message, field))


def _moment(value: Timestamp) -> datetime:
    return datetime.fromtimestamp(value.seconds + value.nanos / 1e9).astimezone()


def _enum_words(field: Any, number: int) -> str:
    kind = field.enum_type
    value = kind.values_by_number.get(number)
    if value is None:
        return str(number)
    # Values carry their enum's name as prefix, as buf wants it.
    prefix = "".join(f"_{c}" if c.isupper() else c.upper() for c in kind.name).strip("_") + "_"
    return str(value.name).removeprefix(prefix).lower().replace("_", " ")


def _lines(message: Message, prefix: str, hidden: frozenset[str]) -> Iterable[tuple[str, str]]:
    for field, value in message.ListFields():
        if field.name in hidden:
            continue
        name = prefix + field.name
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            yield from ((f"{name}.{key}", printable(str(one))) for key, one in sorted(value.items()))
            continue
        values = list(value) if field.is_repeated else [value]
        if field.message_type is None:
            yield name, ", ".join(_scalar(field, one) for one in values)
            continue
        for index, one in enumerate(values):
            label = f"{name}[{index}]" if field.is_repeated else name
            if isinstance(one, Timestamp):
                yield label, time_text(one)
            elif isinstance(one, Duration):
                yield label, one.ToJsonString()
            else:
                yield from _lines(one, f"{label}.", hidden)


def _scalar(field: FieldDescriptor, value: Any) -> str:
    if field.enum_type is not None:
        return _enum_words(field, value)
    return printable(str(value))

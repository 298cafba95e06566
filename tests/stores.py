"""Everything that an installation keeps, byte by byte, and where in it given words are.

A place is `database <table>.<column>`, `redis <key> <field>`, `file <path in the state folder>` or `log`. Compressed
values and the commands in Valkey's append-only file are decoded as well.
"""

from __future__ import annotations

import re
import sqlite3
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import redis

Piece = tuple[str, bytes]
BULK = re.compile(rb"\$(\d{1,9})\r\n")
ZLIB_AND_GZIP = 47
"""Window bits for which zlib looks at the header itself."""
MAX_UNPACKED = 64 << 20


def found_in(pieces: Iterator[Piece], words: Mapping[str, list[bytes]]) -> dict[str, set[str]]:
    """Name of a word → places where one of its forms is."""
    found: dict[str, set[str]] = {}
    while some := [(place, form) for place, value in islice(pieces, 1000) for form in forms(value)]:
        whole = b"\n".join(form for _, form in some)  # most words are in none of a thousand small pieces
        for name, looks in words.items():
            for look in looks:
                if look in whole:
                    places = {place for place, form in some if look in form}
                    found.setdefault(name, set()).update(places)
    return {name: places for name, places in found.items() if places}


def forms(value: bytes) -> Iterator[bytes]:
    """As it is, and unpacked as often as it was packed."""
    yield value
    unpack = zlib.decompressobj(ZLIB_AND_GZIP)
    if value[:2] == b"\x1f\x8b" or (value[:1] == b"\x78" and len(value) > 6):
        try:
            yield from forms(unpack.decompress(value, MAX_UNPACKED))
        except zlib.error:
            return  # it only began like one


def sqlite_rows(path: Path) -> Iterator[Piece]:
    with closing(sqlite3.connect(path, timeout=10)) as connection:
        tables = [name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")]
        for table in tables:
            yield from _pieces(table, connection.execute(f'select * from "{table}"'))


def postgresql_rows(url: str) -> Iterator[Piece]:
    import psycopg

    with psycopg.connect(url) as connection:
        named = "select table_name from information_schema.tables where table_schema = 'public'"
        for (table,) in connection.execute(named).fetchall():
            yield from _pieces(table, connection.execute(f'select * from "{table}"'))


def _pieces(table: str, cursor: Any) -> Iterator[Piece]:
    columns = [each[0] for each in cursor.description]
    for row in cursor:
        for column, value in zip(columns, row, strict=True):
            raw = bytes(value) if isinstance(value, bytes | memoryview) else str(value).encode()
            yield f"database {table}.{column}", raw


def redis_values(client: redis.Redis) -> Iterator[Piece]:
    """Of all keys; their names, too."""
    for key in client.scan_iter(count=1000):
        name = key.decode(errors="replace")
        yield f"redis {name}", key
        for field, value in _values(client, key):
            yield f"redis {name} {field.decode(errors='replace')}".rstrip(), value
            yield f"redis {name}", field


def _values(client: redis.Redis, key: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(field, value); without a field where the kind has none."""
    kind = client.type(key)
    if kind == b"string":
        yield b"", client.get(key) or b""
    elif kind == b"hash":
        yield from client.hgetall(key).items()
    elif kind == b"stream":
        for _, values in client.xrange(key):
            yield from values.items()
    elif kind == b"list":
        yield from ((b"", value) for value in client.lrange(key, 0, -1))
    elif kind == b"set":
        yield from ((b"", value) for value in client.smembers(key))
    elif kind == b"zset":
        yield from ((b"", value) for value, _ in client.zscan_iter(key))
    else:
        assert kind == b"none", f"{key!r} is of a kind that this search does not know: {kind!r}"


def files(folder: Path) -> Iterator[Piece]:
    """All files below it, as bytes."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        place, content = f"file {path.relative_to(folder).as_posix()}", path.read_bytes()
        yield place, content
        if path.suffix == ".aof":
            yield from ((place, each) for each in _bulk_strings(content))


def _bulk_strings(content: bytes) -> Iterator[bytes]:
    """The words of the commands in an append-only file."""
    at = 0
    while match := BULK.search(content, at):
        at = match.end() + int(match[1])
        yield content[match.end() : at]

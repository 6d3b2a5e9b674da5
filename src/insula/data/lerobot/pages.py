"""The pages of a parquet file, counted.

A footer can claim one value where the pages hold a billion, and the reader of the library allocates what the pages
say. So the header of each page is read before any page is: Thrift's compact protocol, as parquet.thrift has it.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from insula.errors import DatasetError

MANY_PAGES = 1_000_000
"""More in one column of one row group are not believed: a page holds a megabyte, or some thousand rows."""
_DATA, _DATA_V2 = 0, 3  # PageType
_PLAIN_AS_STORED = {0, 3, 4}  # Encoding: PLAIN, RLE, BIT_PACKED

# Fields of PageHeader and of the headers inside it, by their numbers.
_TYPE, _UNPACKED, _PACKED, _OF_DATA, _OF_DATA_V2 = 1, 2, 3, 5, 8
_VALUES, _ENCODING, _ENCODING_V2 = 1, 2, 4


@dataclass(frozen=True)
class Pages:
    """Of one column of one row group: how many values its pages hold, their bytes once unpacked, and whether each value
    is written out there, rather than pointed at or shortened."""

    values: int
    stored: int
    is_plain: bool


def count_pages(path: Path, column: pq.ColumnChunkMetaData) -> Pages:
    """Raises DatasetError where a header cannot be read."""
    starts = [column.data_page_offset]
    if column.has_dictionary_page and column.dictionary_page_offset is not None:
        starts.append(column.dictionary_page_offset)
    values = stored = 0
    is_plain = True
    try:
        for number, header in enumerate(_headers(path, min(starts), column.total_compressed_size)):
            if number > MANY_PAGES:
                raise ValueError(f"more than {MANY_PAGES:,} pages")

            stored += header[_UNPACKED]
            if header[_TYPE] == _DATA:
                values += header[_OF_DATA][_VALUES]
                is_plain &= header[_OF_DATA][_ENCODING] in _PLAIN_AS_STORED
            elif header[_TYPE] == _DATA_V2:
                values += header[_OF_DATA_V2][_VALUES]
                is_plain &= header[_OF_DATA_V2][_ENCODING_V2] in _PLAIN_AS_STORED
    except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
        message = f"{path}: the pages of {column.path_in_schema!r} cannot be read ({error}); restore the file"
        raise DatasetError(message, "file damaged") from None

    return Pages(values, stored, is_plain)


def _headers(path: Path, start: int, size: int) -> Iterator[dict[int, Any]]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = start
        while at < min(start + size, len(data)):
            header, at = _struct(data, at)
            if header[_PACKED] < 0 or header[_UNPACKED] < 0:
                raise ValueError("a page of negative size")
            yield header
            at += header[_PACKED]


def _struct(data: mmap.mmap, at: int) -> tuple[dict[int, Any], int]:
    """The fields of a struct by their numbers, and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while kind := data[at]:
        at += 1
        if kind >> 4:  # how far the number is from the last one
            number += kind >> 4
        else:
            number, at = _integer(data, at)
        fields[number], at = _value(kind & 15, data, at)

    return fields, at + 1


def _value(kind: int, data: mmap.mmap, at: int) -> tuple[Any, int]:
    match kind:
        case 1 | 2:  # true and false are kinds of their own
            return kind == 1, at
        case 3:
            return data[at], at + 1
        case 4 | 5 | 6:
            return _integer(data, at)
        case 7:
            return None, at + 8
        case 8:  # bytes: the smallest and largest value of the page, which nobody asks for
            length, at = _varint(data, at)
            return None, at + length
        case 12:
            return _struct(data, at)
    raise ValueError(f"no page header has a field of kind {kind}")


def _integer(data: mmap.mmap, at: int) -> tuple[int, int]:
    """Zigzag: 0, -1, 1, -2, ... are written as 0, 1, 2, 3, ..."""
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    """Seven bits a byte, the lowest first; the eighth says that there are more."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at

    raise ValueError("a number of more than 64 bits")

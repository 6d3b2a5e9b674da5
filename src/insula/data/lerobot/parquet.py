"""Parquet files, opened with care: a file of a few bytes can claim billions of rows, or hold a text a billion times."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from insula.data.lerobot.metadata import MANY, is_web_page, lfs_message, shown
from insula.data.lerobot.pages import count_pages
from insula.errors import DatasetError, FileError, brief, did_you_mean
from insula.files import MIB, lfs_size

COLUMN_LIMIT = 512 * MIB
"""The most that one reading may take in memory: a column of one data file, or the pictures of one row group."""
TABLE_LIMIT = 128 * MIB
"""The same for a table of episodes or tasks."""
BELIEVABLE_ROWS = 1_000_000
ROWS_PER_BYTE = 16
"""More rows than BELIEVABLE_ROWS, and than this many for each byte of the file, are not believed."""
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}


def open_parquet(path: Path) -> pq.ParquetFile:
    """Raises DatasetError where the file is missing, a Git LFS pointer, cut short, or claims too many rows."""
    try:
        pointed_to = lfs_size(path)
    except FileNotFoundError:
        raise DatasetError(f"{path}: missing; the copy of the data set is incomplete", "file missing") from None
    except FileError as error:
        raise DatasetError(f"{error}; restore it", "file damaged") from None

    if pointed_to is not None:
        raise DatasetError(lfs_message(path, pointed_to), "git lfs")

    size = path.stat().st_size
    if not size:
        raise DatasetError(f"{path}: is empty (0 bytes); copy the file again", "empty file")

    # Before parquet is tried: its own message would say that a magic number is missing.
    with path.open("rb") as start:
        if is_web_page(start.read(64)):
            raise DatasetError(f"{path}: is a web page, not the file itself; download it again", "web page")

    try:
        # Mapped: training reads a few row groups of many large files.
        file = pq.ParquetFile(path, memory_map=True)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(
            f"{path}: not a readable parquet file ({size} bytes; {brief(error)}); "
            "it was probably cut short while copying or recording: restore it",
            "file damaged",
        ) from None

    rows = file.metadata.num_rows
    # Runs of one value pack well, but not this well.
    if rows > max(BELIEVABLE_ROWS, ROWS_PER_BYTE * size):
        raise DatasetError(f"{path}: claims {rows:,} rows in {size:,} bytes; restore the file", "file damaged")

    return file


def read_columns(
    file: pq.ParquetFile, columns: Sequence[str], path: Path, group: int | None = None, limit: int = COLUMN_LIMIT
) -> pa.Table:
    """`columns` of the file, or of one row group. Raises DatasetError where they are damaged, or would take more than
    `limit` bytes."""
    groups = list(range(file.num_row_groups)) if group is None else [group]
    part = "" if group is None else f", row group {group}"
    fixed, largest_text, texts = _claims(file, columns, path, groups)
    # Numbers take what they take, whatever way they are read.
    if fixed > limit:
        raise DatasetError(_too_large(path, part, columns, fixed, limit), "file damaged")

    taken = 0
    try:
        if fixed + texts <= limit:
            taken = fixed + texts
            return file.read_row_groups(groups, columns=list(columns), use_threads=False)

        # A dictionary holds a text once for any number of rows: decode some at a time, and stop at the limit.
        at_once = max(1, min(65_536, limit // (8 * max(largest_text, 1))))
        batches = []
        for batch in file.iter_batches(at_once, row_groups=groups, columns=list(columns), use_threads=False):
            taken += batch.nbytes
            if taken > limit:
                raise DatasetError(_too_large(path, part, columns, taken, limit), "file damaged")
            batches.append(batch)
        return pa.Table.from_batches(batches)
    except pa.ArrowMemoryError:  # below the limit, and still more than this machine has to spare: nothing is damaged
        raise DatasetError(
            f"{path}{part}: {', '.join(columns)} would take {(taken + largest_text) / MIB:,.0f} MiB or more in memory, "
            "more than is free here; close other programs, or write it in smaller files",
            "file damaged",
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path}{part}: damaged ({brief(error)}); restore the file", "file damaged") from None


def _claims(file: pq.ParquetFile, columns: Sequence[str], path: Path, groups: list[int]) -> tuple[int, int, int]:
    """From the headers of the pages: bytes of the numbers, the size of the largest text, and the most all texts can
    take."""
    fixed, largest, texts = 0, 0, 0
    wanted = tuple(f"{name}." for name in columns)
    for group in groups:
        row_group = file.metadata.row_group(group)
        for number in range(row_group.num_columns):
            column = row_group.column(number)
            # A column of pictures has parts, `bytes` and `path`; the dot keeps "x" from meaning "xy".
            if not f"{column.path_in_schema}.".startswith(wanted):
                continue

            pages = count_pages(path, column)
            width = _WIDTHS.get(column.physical_type)
            if width is not None:
                fixed += pages.values * width
                continue

            fixed += pages.values * 4  # where each text begins
            largest = max(largest, pages.stored)
            texts += pages.stored if pages.is_plain else pages.stored * pages.values

    return fixed, largest, texts


def _too_large(path: Path, part: str, columns: Sequence[str], size: int, limit: int) -> str:
    return (
        f"{path}{part}: {', '.join(columns)} would take {size / MIB:,.0f} MiB or more in memory, at most "
        f"{limit / MIB:g} MiB are read at once; write it in smaller files, or restore it"
    )


def read_table(path: Path, needed: Sequence[str], optional: Sequence[str] = ()) -> pa.Table:
    """A table of episodes or tasks. Raises DatasetError naming a column that is missing."""
    file = open_parquet(path)
    names = file.schema_arrow.names
    for name in needed:
        if name not in names:
            hint = did_you_mean(name, names)
            raise DatasetError(f"{path}: no column {name!r}{hint}; it has {', '.join(names[:20]) or 'none'}")

    if file.metadata.num_rows > MANY:
        raise DatasetError(f"{path}: claims {file.metadata.num_rows:,} rows, at most {MANY:,} are read; restore it")

    wanted = [*needed, *(name for name in optional if name in names)]

    return read_columns(file, wanted, path, limit=TABLE_LIMIT)


def whole_numbers(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """int64 of a column. Raises DatasetError naming the first row that is null or no whole number."""
    column = plain(table[name])
    if column.null_count:
        row = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
        more = f" ({column.null_count} such rows)" if column.null_count > 1 else ""
        raise DatasetError(f"{path}, row {row}: {name!r} is null, expected a whole number{more}", "null")

    if pa.types.is_integer(column.type):
        values = column.to_numpy(zero_copy_only=False)
        # Room for sums and differences of two of them.
        good = (values >= -(2**62)) & (values < 2**62)
    elif pa.types.is_floating(column.type):
        values = column.to_numpy(zero_copy_only=False)
        # A float holds whole numbers up to 2^53; pandas makes floats where one value is missing.
        good = np.isfinite(values) & (np.abs(np.nan_to_num(values)) < 2**53) & (np.floor(values) == values)
    else:
        first = f" such as {shown(column[0].as_py())}" if len(column) else ""
        raise DatasetError(f"{path}: {name!r} holds {column.type}{first}, expected whole numbers")

    if not good.all():
        row = int(np.argmin(good))
        raise DatasetError(f"{path}, row {row}: {name!r} is {shown(values[row].item())}, expected a whole number")

    return values.astype(np.int64)


def plain(column: pa.ChunkedArray) -> pa.Array:
    """One array, dictionaries written out."""
    # to_numpy of chunks with dictionaries of their own would mix up their codes.
    whole = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    return pc.cast(whole, whole.type.value_type) if pa.types.is_dictionary(whole.type) else whole

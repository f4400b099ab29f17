"""Parquet tables: schemas derived from the row dataclasses, atomic writes, versioned reads.

Every file carries key-value metadata (``triptych.table``, ``triptych.schema_version`` and what the
writer
adds: config hash, code version, input snapshot), and stays readable by plain
``pandas.read_parquet``.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from schemas import rows
from schemas.arrow_compute import pc
from schemas.errors import ManifestError
from schemas.storage import atomic_path

SCHEMA_VERSION = "1.0"
"""Major.minor. Readers refuse another major version; a minor one only adds nullable columns."""

R = TypeVar("R")

_type_hints = functools.cache(typing.get_type_hints)
"""Working them out anew for every row would take longer than all the rest of reading it."""

_SCALARS: dict[object, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
}


def _arrow_type(annotation: Any) -> tuple[pa.DataType, bool]:
    """Arrow type and nullability of one dataclass annotation."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        (inner,) = [a for a in typing.get_args(annotation) if a is not type(None)]
        return _arrow_type(inner)[0], True
    if origin is list:
        (item,) = typing.get_args(annotation)
        return pa.list_(pa.field("item", _arrow_type(item)[0], nullable=False)), False
    if dataclasses.is_dataclass(annotation):
        return pa.struct(_fields(typing.cast("type[Any]", annotation))), False
    return _SCALARS[annotation], False


def _fields(row_type: type[Any]) -> list[pa.Field]:
    hints = typing.get_type_hints(row_type)
    result: list[pa.Field] = []
    for f in dataclasses.fields(row_type):
        arrow, nullable = _arrow_type(hints[f.name])
        result.append(pa.field(f.name, arrow, nullable=nullable))
    return result


@dataclass(frozen=True)
class Table(Generic[R]):
    """A named table: its row type, the columns that identify a row, and the stored order.

    An empty ``sort`` leaves the order to whoever writes the table.
    """

    name: str
    row: Callable[..., R]
    key: tuple[str, ...]
    sort: tuple[str, ...]

    @property
    def schema(self) -> pa.Schema:
        """The Arrow schema derived from the row dataclass."""
        return pa.schema(_fields(typing.cast("type[Any]", self.row)))


SOURCES = Table("sources", rows.Source, ("source_id",), ("source_id",))
SHOTS = Table("shots", rows.Shot, ("shot_id",), ("source_id", "index"))
CLIPS = Table("clips", rows.Clip, ("clip_id",), ("source_id", "index"))
EXPORTS = Table("exports", rows.Export, ("clip_id",), ("clip_id",))
EMBEDDINGS = Table(
    "embeddings",
    rows.Embedding,
    ("clip_id", "model_id"),
    ("source_id", "start_pts", "clip_id", "model_id"),
)
CAPTION_SCORES = Table(
    "caption_scores", rows.CaptionScore, ("clip_id", "model_id"), ("clip_id", "model_id")
)
CLIP_SCORES = Table(
    "clip_scores", rows.ClipScore, ("clip_id", "scorer_id"), ("clip_id", "scorer_id")
)
WINDOWS = Table("windows", rows.Window, ("sample_id",), ("source_id", "index"))
SAMPLES = Table("samples", rows.Sample, ("sample_id",), ())
LATENTS = Table("latents", rows.Latent, ("key",), ("key",))
PROMPTS = Table("prompts", rows.Prompt, ("prompt_id",), ("prompt_id",))
REJECTS = Table(
    "rejects",
    rows.Reject,
    ("record_id", "stage"),
    ("stage", "reason", "record_id", "uri", "detail"),
)
GENERATIONS = Table(
    "generations", rows.Generation, ("generation_id",), ("prompt_id", "generation_id")
)
SCORES = Table("scores", rows.Score, ("generation_id", "model_id"), ("prompt_id", "generation_id"))


def to_arrow(table: Table[R], records: Iterable[R]) -> pa.Table:
    """Rows as an Arrow table in the table's own order, whatever order they came in.

    Embedding vectors become a fixed-size list of float16; their length is that of the first row.

    Raises:
        ManifestError: Two rows share a key.
    """
    dicts = [dataclasses.asdict(typing.cast("Any", r)) for r in records]
    keys = [tuple(d[k] for k in table.key) for d in dicts]
    if table is not REJECTS and len(set(keys)) != len(keys):
        seen: set[tuple[Any, ...]] = set()
        twice = next(k for k in keys if k in seen or seen.add(k))
        raise ManifestError(
            f"two rows of table {table.name!r} have the same key",
            where=dict(zip(table.key, twice, strict=True)),
            expected=f"{', '.join(table.key)} identifies a row",
            do="remove the duplicate from the input",
        )
    dicts.sort(key=lambda d: tuple((d[c] is None, d[c]) for c in table.sort))
    schema = table.schema
    if table is EMBEDDINGS:
        dim = len(dicts[0]["vector"]) if dicts else 0
        fixed = pa.field("vector", pa.list_(pa.float16(), dim), nullable=False)
        schema = schema.set(schema.get_field_index("vector"), fixed)
        for d in dicts:
            d["vector"] = np.asarray(d["vector"], dtype=np.float16)
    return pa.Table.from_pylist(dicts, schema=schema)


def list_column(values: pa.Array, length: int) -> pa.ListArray:
    """A column of lists of equal length, from all their values one after the other."""
    offsets = np.arange(0, len(values) + 1, length, dtype=np.int32)
    item = pa.field("item", values.type, nullable=False)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=pa.list_(item))


def vectors_of(rows: pa.Table) -> npt.NDArray[np.floating]:
    """The column ``vector`` as (N, D) of the stored type, without a copy where that can be."""
    column = rows["vector"].combine_chunks()
    flat = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), column.type.list_size)


def from_arrow(table: Table[R], data: pa.Table) -> list[R]:
    """Arrow table back to rows."""
    row_type = typing.cast("type[Any]", table.row)
    return [typing.cast("R", build_row(row_type, record)) for record in data.to_pylist()]


def build_row(row_type: type[R], record: Mapping[str, Any]) -> R:
    """A row, with the rows nested in it, from a mapping as ``dataclasses.asdict`` gives it."""
    hints = _type_hints(row_type)
    values: dict[str, Any] = {}
    for f in dataclasses.fields(typing.cast("Any", row_type)):
        value = record[f.name]
        args = typing.get_args(hints[f.name])
        if args and dataclasses.is_dataclass(args[0]) and isinstance(value, list):
            nested = typing.cast("type[Any]", args[0])
            value = [build_row(nested, v) for v in typing.cast("list[Mapping[str, Any]]", value)]
        values[f.name] = value
    return row_type(**values)


def write_table(
    path: Path, table: Table[R], records: Iterable[R], metadata: Mapping[str, str] | None = None
) -> int:
    """Write rows to ``path`` atomically, sorted, with metadata. Returns the number of rows.

    Equal rows and metadata give byte-identical files.
    """
    return write_batches(path, table, [to_arrow(table, records)], metadata)


def write_batches(
    path: Path,
    table: Table[Any],
    batches: Iterable[pa.Table],
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Write Arrow tables one after the other, without holding them all. Returns the number of rows.

    They have the table's columns and come in its order. Equal rows in equal batches with equal
    metadata give byte-identical files.

    Raises:
        ManifestError: Rows are not in the table's order.
    """
    meta = {"triptych.table": table.name, "triptych.schema_version": SCHEMA_VERSION}
    meta.update({f"triptych.{k}": v for k, v in (metadata or {}).items()})
    num_rows = 0
    last: pa.Table | None = None
    with atomic_path(path) as tmp, ExitStack() as stack:
        writer: pq.ParquetWriter | None = None
        for batch in batches:
            if writer is None:
                schema = _schema_like(table, batch.schema).with_metadata(meta)
                writer = stack.enter_context(_writer(tmp, schema))
            if not batch.num_rows:
                continue
            if table.sort:
                keys = batch.select(list(table.sort))
                _check_order(path, table, pa.concat_tables([last, keys]) if last else keys)
                last = keys.slice(keys.num_rows - 1)
            writer.write_table(batch.select(writer.schema.names).cast(writer.schema))
            num_rows += batch.num_rows
        if writer is None:
            schema = _schema_like(table, table.schema).with_metadata(meta)
            stack.enter_context(_writer(tmp, schema))
        stack.close()  # before the file takes its name
    return num_rows


def _schema_like(table: Table[Any], found: pa.Schema) -> pa.Schema:
    """The table's schema; vectors have the length that is found, or none."""
    schema = table.schema
    if table is not EMBEDDINGS:
        return schema
    vector = found.field("vector").type
    dim = vector.list_size if pa.types.is_fixed_size_list(vector) else 0
    field = pa.field("vector", pa.list_(pa.float16(), dim), nullable=False)
    return schema.set(schema.get_field_index("vector"), field)


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    if "vector" not in schema.names:
        return pq.ParquetWriter(path, schema, compression="zstd")
    # Vectors hardly compress, and a dictionary of them would be as large as they are.
    others = [name for name in schema.names if name != "vector"]
    codecs: Any = dict.fromkeys(others, "zstd") | {"vector.list.element": "none"}
    columns: Any = others
    return pq.ParquetWriter(
        path, schema, compression=codecs, use_dictionary=columns, write_statistics=columns
    )


def _check_order(path: Path, table: Table[Any], rows: pa.Table) -> None:
    """Compare each row with the next by the sort columns, most significant first."""
    tied: Any = True
    for name in table.sort:
        column = rows[name].combine_chunks()
        before, after = column.slice(0, len(column) - 1), column.slice(1)
        wrong = pc.and_(tied, pc.fill_null(pc.greater(before, after), False))
        if pc.any(wrong).as_py():
            at = pc.index(wrong, True).as_py()
            raise ManifestError(
                f"rows of table {table.name!r} are not in order",
                where=path,
                found=f"{name} {before[at].as_py()!r} before {after[at].as_py()!r}",
                expected=f"sorted by {', '.join(table.sort)}",
                do="this is a bug in Triptych: please report it with the run directory",
            )
        tied = pc.and_(tied, pc.fill_null(pc.equal(before, after), True))


def read_table(path: Path, table: Table[R]) -> list[R]:
    """Read rows written by :func:`write_table`.

    Raises:
        ManifestError: The file is missing, not Parquet, another table, or of another major version.
    """
    return from_arrow(table, read_arrow(path, table))


def iter_tables(
    path: Path, table: Table[Any], columns: Sequence[str] | None = None, rows: int = 65536
) -> Iterator[pa.Table]:
    """Like :func:`read_arrow`, at most so many rows at a time."""
    file = _open(path, table)
    for batch in file.iter_batches(rows, columns=list(columns or table.schema.names)):
        yield pa.Table.from_batches([batch])


def read_metadata(path: Path) -> dict[str, str]:
    """What the writer noted in a file, without the ``triptych.`` prefix; empty if there is none."""
    raw = pq.read_schema(path).metadata or {}
    pairs = {k.decode(): v.decode() for k, v in raw.items()}
    return {k.removeprefix("triptych."): v for k, v in pairs.items() if k.startswith("triptych.")}


def read_arrow(path: Path, table: Table[Any], columns: Sequence[str] | None = None) -> pa.Table:
    """Like :func:`read_table`, as an Arrow table, optionally only some columns."""
    return _open(path, table).read(columns=list(columns or table.schema.names))


def _open(path: Path, table: Table[Any]) -> pq.ParquetFile:
    if not path.is_file():
        raise ManifestError(
            f"table {table.name!r} is not there",
            where=path,
            do="run the stage that writes it, or give the right workspace",
        )
    try:
        file = pq.ParquetFile(path)
        meta = read_metadata(path)
    except pa.ArrowInvalid as error:
        raise ManifestError(
            f"table {table.name!r} cannot be read as Parquet",
            where=path,
            found=error,
            do="delete the file and run again; it is written anew",
        ) from error
    name = meta.get("table", table.name)
    version = meta.get("schema_version", SCHEMA_VERSION)
    if name != table.name or version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise ManifestError(
            "this file is another table, or of a version this code does not read",
            where=path,
            found=f"table {name!r}, schema version {version}",
            expected=f"table {table.name!r}, schema version {SCHEMA_VERSION.split('.')[0]}.x",
            do="give the right file, or use the Triptych version that wrote it",
        )
    missing = [c for c in table.schema.names if c not in file.schema_arrow.names]
    if missing:
        raise ManifestError(
            f"table {table.name!r} lacks columns",
            where=path,
            found=f"missing {missing}",
            expected=f"columns {table.schema.names}",
            do="write the file with Triptych, or add the columns",
        )
    return file

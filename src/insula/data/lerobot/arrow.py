"""Features as Arrow types, and values as Arrow arrays, with the notes that other tools read them by."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from insula.data.images import EncodedImages
from insula.data.lerobot.info import Feature

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def arrow_schema(features: Mapping[str, Feature]) -> pa.Schema:
    """Arrow types, with the note that makes the `datasets` library read images as images."""
    fields: list[pa.Field] = []
    notes: dict[str, dict[str, Any]] = {}
    for name, feature in features.items():
        if feature.dtype == "video":
            continue
        if feature.is_camera:
            kind, notes[name] = IMAGE, {"_type": "Image"}
        else:
            kind, notes[name] = _arrow_type(feature.dtype), {"dtype": feature.dtype, "_type": "Value"}
            if feature.shape != (1,):
                # Of fixed size: no offsets to store, and no row of another length can be written.
                kind = pa.list_(kind, feature.shape[0])
                notes[name] = {"feature": notes[name], "length": feature.shape[0], "_type": "Sequence"}

        fields.append(pa.field(name, kind))

    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": notes}})})


def _arrow_type(dtype: str) -> pa.DataType:
    return pa.string() if dtype == "string" else pa.from_numpy_dtype(np.dtype(dtype))


def arrow_array(feature: Feature, values: Any) -> pa.Array:
    """One episode of a column, as `arrow_schema` has it."""
    if isinstance(values, EncodedImages):
        paths = [f"frame-{i:06d}.png" for i in range(len(values))]
        return pa.StructArray.from_arrays([pa.array(values.files, pa.binary()), pa.array(paths)], fields=list(IMAGE))

    if isinstance(values, np.ndarray) and values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), feature.shape[0])

    return pa.array(values, _arrow_type(feature.dtype))


def texts_table(column: str, texts: Mapping[str, int]) -> pa.Table:
    """Of tasks or subtasks: columns `column`, marked as the index that pandas will see, and `column`_index."""

    def describe(name: str, kind: str, numpy: str) -> dict[str, Any]:
        return {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}

    number = f"{column}_index"

    # LeRobot looks texts up by the index of the data frame, which pandas restores from this note.
    note = {
        "index_columns": [column],
        "column_indexes": [],
        "columns": [describe(number, "int64", "int64"), describe(column, "unicode", "object")],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    columns = {number: pa.array(list(texts.values()), pa.int64()), column: pa.array(list(texts), pa.string())}

    return pa.table(columns).replace_schema_metadata({"pandas": json.dumps(note)})

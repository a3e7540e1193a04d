"""Brings records and items of other machines home: sorted, one of an id, identical or refused."""

from pathlib import Path

from bench import Refusal
from bench.record import RERUN, United, dump, read_record
from bench.store import Store
from bench.whole import replace_whole

KEYS = ["run", "part", "item"]  # that sort the items
TAKES = "merge takes a results folder, a run folder, a records.jsonl or a record.json"


def add_records(into: United, path: Path) -> None:
    """Records under a path: a records file, a run folder, or a results folder with any of them below."""
    files = [path] if path.is_file() else [*sorted(path.rglob("records.jsonl")), *sorted(path.rglob("record.json"))]
    if not files:
        raise Refusal(f"no records under {path}; looked for records.jsonl and record.json")
    for file in files:
        if file.suffix == ".jsonl":
            into.add_lines(file)
        elif file.suffix == ".json":
            into.add(read_record(file, "", RERUN if file.name == "record.json" else TAKES), str(file))
        else:
            raise Refusal(f"{file} is no record and no records file; {TAKES}")


def merge(paths: list[Path], target: Path) -> tuple[int, int]:
    """Add records (and items) under `paths` to target/records.jsonl: sorted by id, identical or refused. (new, all)."""
    records, items = target / "records.jsonl", target / "items.parquet"
    found = United()
    if records.exists():
        found.add_lines(records)
    before, united = set(found.records), found.records
    for path in paths:
        add_records(found, path)
    table = _merged_items(paths, items, set(united))
    Store(target).writable(target)
    if table is not None:
        replace_whole(items, lambda path: _write_items(table, path))
    if len(united) > len(before):
        text = "".join(dump(united[i]) + "\n" for i in sorted(united))
        replace_whole(records, lambda path: path.write_text(text))
    return len(united.keys() - before), len(united)


def _merged_items(paths: list[Path], target: Path, wanted: set[str]):
    """Items of the merged records as one table, None if nothing is new; those of one run are identical or refused."""
    files = [target] if target.exists() else []
    for path in paths:
        files += [path.with_name("items.parquet")] if path.is_file() else sorted(path.rglob("items.parquet"))
    held, new = {}, False
    for file in files:
        for run_id, table in _by_run(file, wanted) if file.exists() else ():
            if run_id not in held:
                held[run_id], new = (table, file), new or file != target
            elif not _same(held[run_id][0], table):
                raise Refusal(f"items of {run_id} differ between {file} and {held[run_id][1]}; remove one of them")
    return _joined([held[run_id] for run_id in sorted(held)]) if new else None


def _by_run(file: Path, wanted: set[str]) -> list[tuple]:
    """(run, its rows by part and item) of each wanted run in a file, without columns in which it has nothing."""
    import numpy as np

    table = _read_items(file).sort_by([(key, "ascending") for key in KEYS])
    runs, starts = np.unique(table["run"].to_numpy(), return_index=True)
    ends, found = [*starts[1:], len(table)], []
    for run_id, start, end in zip(runs, starts, ends, strict=True):
        if run_id in wanted:
            rows = table.slice(start, end - start)
            filled = [name for name in rows.column_names if rows[name].null_count < len(rows)]
            found.append((run_id, rows.select(filled)))
    return found


def _same(one, other) -> bool:
    """Whether two tables of a run's items have the same values, in any order of columns and any width of numbers."""
    if set(one.column_names) != set(other.column_names) or len(one) != len(other):
        return False
    other = other.select(one.column_names)
    if one.equals(other):
        return True
    left, right = one.to_pandas(), other.to_pandas()
    return bool(((left == right) | (left.isna() & right.isna())).all(axis=None))


def _joined(held: list[tuple]):
    """One table of all (table, file)."""
    import pyarrow as pa

    schema = held[0][0].schema
    for rows, file in held:
        try:
            schema = pa.unify_schemas([schema, rows.schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise Refusal(f"{file}: items of another type than before ({str(error).splitlines()[0]})") from None
    table = pa.concat_tables([rows for rows, _ in held], promote_options="permissive")
    return table.select([*KEYS, *sorted(set(table.column_names) - set(KEYS))])


def _write_items(table, path: Path) -> None:
    """As small as the values allow, for they are committed: item numbers as steps, floats byte by byte."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    floats = [field.name for field in table.schema if field.type == pa.float32()]
    encodings = {"item": "DELTA_BINARY_PACKED"} | dict.fromkeys(floats, "BYTE_STREAM_SPLIT")
    others = [name for name in table.column_names if name not in encodings]
    pq.write_table(table, path, compression="zstd", use_dictionary=others, column_encoding=encodings)


def _read_items(path: Path):
    """A Parquet file of items; a Refusal for one that is damaged or lacks the keys."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    remedy = "delete it (its records stay) or restore it"
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise Refusal(f"{path} is not readable Parquet ({str(error).splitlines()[0]}); {remedy}") from None
    if missing := set(KEYS) - set(table.column_names):
        raise Refusal(f"{path} has no column {', '.join(sorted(missing))}; {remedy}")
    return table

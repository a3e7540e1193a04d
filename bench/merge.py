"""Brings records and items of other machines home: sorted, one of an id, identical or refused."""

from pathlib import Path

from bench import Refusal
from bench.record import Record, dump, read_record, read_records, unite
from bench.store import Store, replace_whole


def found_records(path: Path) -> dict[str, Record]:
    """Records under a path: a records file, a run folder, or a results folder with any of them below."""
    found: dict[str, Record] = {}
    files = [path] if path.is_file() else [*sorted(path.rglob("records.jsonl")), *sorted(path.rglob("record.json"))]
    if not files:
        raise Refusal(f"no records under {path}; looked for records.jsonl and record.json")
    for file in files:
        if file.suffix == ".jsonl":
            unite(found, read_records(file), str(file))
        else:
            record = read_record(file)
            unite(found, {record.id: record}, str(file))
    return found


def merge(paths: list[Path], target: Path) -> tuple[int, int]:
    """Add records (and items) under `paths` to target/records.jsonl: sorted by id, identical or refused. (new, all)."""
    records, items = target / "records.jsonl", target / "items.parquet"
    united = read_records(records) if records.exists() else {}
    before = set(united)
    for path in paths:
        unite(united, found_records(path), str(path))
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
    import pyarrow as pa
    import pyarrow.compute as pc

    tables = [_read_items(target)] if target.exists() else []
    known = set(tables[0]["run"].unique().to_pylist()) if tables else set()
    before = len(known)
    for path in paths:
        for file in [path.with_name("items.parquet")] if path.is_file() else sorted(path.rglob("items.parquet")):
            if file.exists():
                table = _read_items(file)
                _require_same(tables, table, wanted & known, file)
                runs = [r for r in table["run"].unique().to_pylist() if r in wanted and r not in known]
                tables.append(table.filter(pc.is_in(table["run"], pa.array(runs, pa.string()))))
                known.update(runs)
    if len(known) == before:
        return None
    table = pa.concat_tables([t for t in tables if len(t)], promote_options="permissive")
    keys = ["run", "part", "item"]
    columns = [*keys, *sorted(set(table.column_names) - set(keys))]
    return table.select(columns).sort_by([(key, "ascending") for key in keys])


def _require_same(tables: list, table, runs: set[str], file: Path) -> None:
    """A Refusal if items of these runs are not what an earlier table has of them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    again = table.filter(pc.is_in(table["run"], pa.array(runs, pa.string())))
    if not len(again):
        return
    before = [t.filter(pc.is_in(t["run"], again["run"].unique())) for t in tables]
    both = pa.concat_tables([*before, again], promote_options="permissive").to_pandas()
    odd = both[~both.duplicated(keep=False)]
    if len(odd):
        run_id = odd["run"].iloc[0]
        raise Refusal(f"{file}: items of {run_id} differ from those that are there already; remove one of them")


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
    if missing := {"run", "part", "item"} - set(table.column_names):
        raise Refusal(f"{path} has no column {', '.join(sorted(missing))}; {remedy}")
    return table

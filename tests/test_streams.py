"""Streams: files, folders and loaders in parts give what the same rows give in memory; bad ones are refused with their place."""

import pickle
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import whichkl as wk
from whichkl._checks import InputError
from whichkl.cluster import Threads
from whichkl.families import LinearGaussian, Neural
from whichkl.samples import Loaded, Reading, Shards, open_stream, opening
from whichkl.samples.parquet import ParquetPart
from whichkl.samples.shard import FilePart
from whichkl.samples.stream import joined
from whichkl.solvers import ClosedForm, Stochastic
from whichkl.solvers.work import Work

RNG = np.random.default_rng(0)
X = RNG.standard_normal((21_000, 3)) @ np.array([[1, 0.5, 0], [0, 3, 0.2], [0, 0, 0.1]]) + [5, -2, 100]
KINDS = ["parquet", "arrow", "feather", "npy", "csv"]


def write(path, x, names="abc", **options):
    table = pa.table({name: x[:, i] for i, name in enumerate(names)})
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, **{"row_group_size": 2_500, **options})
    elif path.suffix == ".npy":
        np.save(path, x)
    elif path.suffix == ".csv":
        pyarrow.csv.write_csv(table, path)
    else:
        pyarrow.feather.write_feather(table, path, chunksize=2_500, **options)
    return path


def folder_of(path, kind, cuts=(0, 9_000, 9_001, 21_000)):
    path.mkdir()
    for i, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
        write(path / f"part-{i}.{kind}", X[start:stop])
    return path


def rows(stream):
    return joined([block for part in stream.parts for block in part.blocks()])


def gaussian(target, workers=None):
    work = Work(workers=workers or Threads())
    return ClosedForm().solve(target.unconstrained(), wk.families.Gaussian(), 0, work).best.model


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_the_rows_in_order_and_the_gaussian_of_memory(tmp_path, kind):
    folder = folder_of(tmp_path / "data", kind)
    target = wk.Target.of(folder)
    read = rows(target.stream)
    np.testing.assert_array_equal(read.x.numpy(), X)
    assert read.x.dtype == torch.float64 and bool((read.w == 1).all())
    assert target.names == (("x1", "x2", "x3") if kind == "npy" else ("a", "b", "c"))
    assert target.stream.rows == (None if kind == "csv" else len(X))
    streamed, whole = gaussian(target), gaussian(wk.Target(samples=X))
    torch.testing.assert_close(streamed.loc, whole.loc, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(streamed.scale_tril, whole.scale_tril, rtol=1e-12, atol=1e-12)
    assert torch.equal(streamed.scale_tril, gaussian(target, Threads(1)).scale_tril)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_small_when_pickled_the_same_each_time_and_read_alone(tmp_path, kind):
    folder = folder_of(tmp_path / "data", kind)
    first, second = open_stream(folder), open_stream(str(folder))
    assert list(first.parts) == list(second.parts)
    assert first.identity == second.identity
    for part in first.parts:
        data = pickle.dumps(part)
        assert len(data) < 1_000
        copy = joined(list(pickle.loads(data).blocks()))  # noqa: S301
        assert torch.equal(copy.x, joined(list(part.blocks())).x)


def test_row_groups_are_put_together_to_parts_of_many_rows(tmp_path):
    where, counts = ("a.parquet", 1, 1, ("a",)), (10, 0, 50, 40_000, 40_000, 100_000, 19_940)
    assert [part.groups for part in ParquetPart.cut(where, counts, Reading(), 65_536)] == [(0, 4), (4, 5), (5, 6), (6, 7)]
    assert [part.groups for part in ParquetPart.cut(where, counts, Reading(), 1 << 20)] == [(0, 7)]
    assert ParquetPart.cut(where, counts, Reading(), 65_536)[0].label == "`a.parquet`, row groups 0 to 3"
    path = write(tmp_path / "a.parquet", np.repeat(X, 8, 0), row_group_size=30_000)
    assert len(open_stream(path).parts) == 3


def test_one_file_is_read_into_memory_when_it_is_small_and_streamed_when_not(tmp_path, monkeypatch):
    path = write(tmp_path / "x.parquet", X)
    small = wk.Target.of(path)
    assert small.stream is None and small.names == ("a", "b", "c")
    assert repr(small) == "Target(dim=3, n=21000, access: samples)"
    assert wk.Target(samples=str(path), names=["u", "v", "w"]).names == ("u", "v", "w")
    monkeypatch.setattr(opening, "IN_MEMORY", 10_000)
    large = wk.Target(samples=path)
    assert large.samples is None
    assert repr(large) == "Target(dim=3, streamed in 1 part, n=21000, access: samples)"
    torch.testing.assert_close(gaussian(large).loc, gaussian(small).loc, rtol=1e-12, atol=1e-12)


def test_a_list_of_paths_is_read_in_its_own_order(tmp_path):
    paths = [write(tmp_path / f"{i}.parquet", X[i * 100 : (i + 1) * 100]) for i in range(3)]
    target = wk.Target(samples=[paths[2], str(paths[0])])
    np.testing.assert_array_equal(rows(target.stream).x.numpy(), np.concatenate([X[200:300], X[:100]]))
    assert wk.Target.of(paths).stream.rows == 300
    with pytest.raises(InputError, match=r"0.parquet` is in it twice"):
        wk.Target.of([paths[0], paths[0]])
    with pytest.raises(InputError, match="differ in format"):
        wk.Target.of([paths[0], write(tmp_path / "x.npy", X)])
    with pytest.raises(InputError, match="there is no such file"):
        wk.Target.of([paths[0], tmp_path / "none.parquet"])


def test_narrow_types_are_widened_as_in_memory(tmp_path):
    table = pa.table(
        {
            "half": pa.array(np.array([0.5, 1.5, -2], dtype=np.float16)),
            "whole": pa.array([1, 2**53 + 2, 3], pa.int64()),
            "flag": pa.array([True, False, True]),
            "exact": pa.array([1, 2, 3], pa.decimal128(9, 2)),
            "single": pa.array([0.1, 0.2, 0.3], pa.float32()),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    pyarrow.feather.write_feather(table, tmp_path / "x.arrow")
    for name in ("x.parquet", "x.arrow"):
        x = rows(open_stream(tmp_path / name)).x
        np.testing.assert_array_equal(x.numpy(), wk.Target.of(tmp_path / name).samples.numpy())
        assert x[1].tolist() == [1.5, 2.0**53 + 2, 0, 2, float(np.float32(0.2))]
    for kind in (np.float16, np.int8, np.bool_, ">f4"):
        np.save(tmp_path / "x.npy", (X[:50] > 0).astype(kind))
        np.testing.assert_array_equal(rows(open_stream(tmp_path / "x.npy")).x.numpy(), X[:50] > 0)
    np.save(tmp_path / "x.npy", np.asfortranarray(X))
    np.testing.assert_array_equal(rows(open_stream(tmp_path / "x.npy")).x.numpy(), X)


OTHER = [
    ({"a": [1.0], "b": [2.0]}, r"column `c` of `.*0.parquet` isn't in `.*1.parquet`"),
    ({"a": [1.0], "b": [2.0], "c": [1.0], "d": [1.0]}, r"column `d` of `.*1.parquet` isn't in `.*0.parquet`"),
    ({"b": [1.0], "a": [2.0], "c": [1.0]}, r"column 1 is `a` in `.*0.parquet` and `b` in `.*1.parquet`"),
    ({"a": [1.0], "b": [2], "c": [1.0]}, r"column `b` holds double in `.*0.parquet` and int64 in `.*1.parquet`"),
    ({"a": [1.0], "b": ["2"], "c": [1.0]}, r"read `.*1.parquet`: column `b` holds text in 1 cell \(row 0, `2`\)"),
]


@pytest.mark.parametrize(("columns", "message"), OTHER)
def test_shards_that_disagree_are_refused_with_both_files_and_the_column(tmp_path, columns, message):
    write(tmp_path / "0.parquet", X)
    pyarrow.parquet.write_table(pa.table(columns), tmp_path / "1.parquet")
    with pytest.raises(InputError, match=message):
        wk.Target.of(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_shards_are_passed_over_unless_all_are(tmp_path, kind):
    write(tmp_path / f"0.{kind}", X[:0])
    with pytest.raises(InputError, match="holds no rows"):
        wk.Target(samples=[tmp_path / f"0.{kind}"])
    write(tmp_path / f"1.{kind}", X[:10])
    write(tmp_path / f"2.{kind}", X[:0])
    np.testing.assert_array_equal(rows(wk.Target.of(tmp_path).stream).x.numpy(), X[:10])


def test_what_else_lies_in_a_folder(tmp_path):
    with pytest.raises(InputError, match="it is empty"):
        wk.Target.of(tmp_path)
    write(tmp_path / "0.parquet", X)
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / ".0.parquet.crc").touch()
    assert wk.Target.of(tmp_path).stream.rows == len(X)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match=r"`notes.txt` isn't one of .csv"):
        wk.Target.of(tmp_path)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather", "npy"])
def test_a_truncated_shard_or_a_foreign_file_is_refused_when_opened(tmp_path, kind):
    folder = folder_of(tmp_path / "data", kind)
    broken = folder / f"part-2.{kind}"
    whole = broken.read_bytes()
    for content in (whole[:-20], b"not at all such a file, but long enough to be one"):
        broken.write_bytes(content)
        with pytest.raises(InputError, match=rf"read `.*part-2.{kind}`: it isn't a whole"):
            wk.Target.of(folder)


def test_damage_inside_a_parquet_file_is_found_with_row_group_and_column(tmp_path):
    path = write(tmp_path / "x.parquet", X, compression="gzip", use_dictionary=False, row_group_size=5_000)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(2).column(1)
    data = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle : middle + 2_000] = bytes(2_000)
    path.write_bytes(data)
    stream = open_stream(path)
    with pytest.raises(InputError, match=r"read `.*x.parquet`: column `b` of row group 2 is broken"):
        rows(stream)


def test_damage_inside_an_arrow_file_is_found_with_its_batch(tmp_path):
    path = write(tmp_path / "x.arrow", X, compression="zstd")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 3_000] = bytes(3_000)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"record batch \d is broken"):
        rows(open_stream(path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_changes_or_goes_after_it_was_opened_is_refused(tmp_path, kind):
    stream = open_stream(write(tmp_path / f"x.{kind}", X))
    write(tmp_path / f"x.{kind}", X[:-7])
    with pytest.raises(InputError, match=r"bytes now, and had .* when it was opened"):
        rows(stream)
    (tmp_path / f"x.{kind}").unlink()
    with pytest.raises(InputError, match="no such file or directory on this machine"):
        rows(stream)


PLACES = {
    "parquet": r"`.*part-1.parquet`, row groups 0 to 4: column `b` is {} in 1 cell \(row 8,734\)",
    "arrow": r"`.*part-1.arrow`, record batches 0 to 4: column `b` is {} in 1 cell \(row 8,734\)",
    "npy": r"`.*part-1.npy`, rows 0 to 11,999: column `x2` is {} in 1 cell \(row 8,734\)",
    "csv": r"`.*part-1.csv`: column `b` is {} in 1 cell \(line 8736",
}


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize(("value", "word"), [(np.nan, "missing or NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
def test_a_cell_that_is_no_number_is_found_with_its_place(tmp_path, kind, value, word):
    folder = folder_of(tmp_path / "data", kind, (0, 9_000, 21_000))
    x = X[9_000:].copy()
    x[8_734, 1] = value
    write(folder / f"part-1.{kind}", x)
    with pytest.raises(InputError, match=PLACES[kind].format(word)):
        gaussian(wk.Target.of(folder))


def test_nulls_are_missing_and_huge_numbers_are_not(tmp_path):
    table = pa.table({"a": [1.0, None, 3.0], "b": [1, 2, None]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(
        InputError, match=r"`a` is missing or NaN in 1 cell \(row 1\); column `b` is missing or NaN in 1 cell \(row 2\)"
    ):
        rows(open_stream(tmp_path / "x.parquet"))
    write(tmp_path / "y.parquet", np.full((5, 3), 1.7e308))  # their sum overflows
    assert rows(open_stream(tmp_path / "y.parquet")).x.max() == 1.7e308


CSV = [
    ("a,b\n1,2\n3,x\n", "column `b` holds text in 1 cell .line 3, `x`"),
    ('a,b\n1,2\n3,"1,234"\n', "line 3, `1,234`.. Pass `Target.samples=…, thousands=','"),
    ("a,b\n1,2\n3\n", "line 3 has 1 fields and the first line has 2"),
    ("a,b\n1,2\na,b\n3,4\n", "line 3 repeats the header"),
    ("a;b\n1;2\n3;4\n", "separated by semicolons"),
    ("a,a\n1,2\n", r"column names \['a'\] appear twice"),
    (",a\n0,1\n", "a column has no name"),
    ("a,b\n1,\xff\n".encode("latin-1"), "isn't UTF-8"),
]


@pytest.mark.parametrize(("text", "message"), CSV)
def test_a_bad_csv_is_refused_with_its_line_when_opened(tmp_path, text, message):
    path = tmp_path / "x.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        open_stream(path)


@pytest.mark.parametrize("fault", ["a,b", "1", "1,2,3", "1,x", '"1,234",2', "2020-01-01,1"])
def test_a_fault_far_down_a_csv_is_found_while_reading(tmp_path, monkeypatch, fault):
    monkeypatch.setattr("whichkl.samples.csv._BLOCK_BYTES", 2_000)
    path, lines = tmp_path / "x.csv", [f"{i},{i / 7}" for i in range(2_000)]
    lines[1_500] = fault
    path.write_text("a,b\n" + "\n".join(lines) + "\n")
    stream = open_stream(path)
    with pytest.raises(InputError, match="line 1502"):
        rows(stream)


def test_csv_types_are_told_from_all_rows_marks_are_skipped_and_names_made(tmp_path, monkeypatch):
    monkeypatch.setattr("whichkl.samples.csv._BLOCK_BYTES", 2_000)
    path = tmp_path / "x.csv"
    lines = [f"{i},{'true' if i % 2 else 'false'}" for i in range(1_000)] + ["0.5,true"]
    path.write_bytes(b"\xef\xbb\xbfa,b\n" + "\n".join(lines).encode() + b"\n")
    x = rows(open_stream(path)).x
    assert x[-1].tolist() == [0.5, 1] and x[2].tolist() == [2, 0] and len(x) == 1_001
    path.write_text("\n".join(f"{i},{i + 1}" for i in range(5, 1_000)))
    stream = open_stream(path)
    assert stream.names == ("x1", "x2")
    assert rows(stream).x[:2].tolist() == [[5, 6], [6, 7]] and len(rows(stream).x) == 995


def test_an_index_of_pandas_is_refused_and_extra_metadata_are_not(tmp_path):
    frame = pd.DataFrame(X[:100], columns=list("abc"))
    frame.to_parquet(tmp_path / "0.parquet")
    assert open_stream(tmp_path / "0.parquet").names == ("a", "b", "c")
    frame.set_axis(range(50, 150)).sort_values("a").to_parquet(tmp_path / "0.parquet")
    with pytest.raises(InputError, match="index that pandas wrote"):
        open_stream(tmp_path / "0.parquet")


def test_support_names_and_what_goes_with_samples_are_checked_for_streams(tmp_path):
    folder = folder_of(tmp_path / "data", "parquet")
    with pytest.raises(InputError, match=r"use `dim=5`: the samples have 3 columns"):
        wk.Target(samples=folder, dim=5)
    with pytest.raises(InputError, match=r"use `weights=` here"):
        wk.Target(samples=folder, weights=np.ones(3))
    with pytest.raises(InputError, match=r"row 0 of `.*part-0.parquet` lies outside the support"):
        gaussian(wk.Target(samples=folder, support="positive"))
    assert wk.Target(samples=folder, names=["u", "v", "w"]).names == ("u", "v", "w")


@pytest.mark.parametrize(
    ("family", "solver"), [(LinearGaussian(), None), (Neural("normal", hidden=(4,)), Stochastic(steps=20, learning_rate=0.01))]
)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_events_of_a_loader_have_the_shape_in_which_y_came(family, solver, shape):
    x, y = torch.from_numpy(X[:200, :2]), torch.from_numpy(X[:200, 2]).reshape(200, *shape)
    data = TensorDataset(x, y)
    for samples in ((x, y), data, DataLoader(data, 50, shuffle=True), DataLoader([(x, y)], None)):
        target = wk.Target(samples=samples)
        assert target.scalar == (shape == ())
        assert tuple(wk.fit(target, family, solver=solver, judge=False).model(x[:3]).event_shape) == shape


def test_columns_of_a_folder_are_given_as_those_of_a_table_are(tmp_path):
    folder = folder_of(tmp_path / "data", "parquet")
    streamed = wk.Target(samples=folder, given=["c", "a"])
    held = wk.Target(samples=pd.DataFrame(X, columns=list("abc")), given=["c", "a"])
    assert (streamed.names, streamed.context_names, streamed.dim) == (("b",), ("c", "a"), 1)
    assert (held.names, held.context_names, held.scalar, streamed.scalar) == (("b",), ("c", "a"), True, True)
    one, other = (wk.fit(target, LinearGaussian(), judge=False).model for target in (streamed, held))
    torch.testing.assert_close(one.weight, other.weight)
    assert one(X[:2, :2]).event_shape == other(X[:2, :2]).event_shape == ()
    assert wk.Target(samples=folder, given="a").names == ("b", "c")


def test_a_loader_is_read_in_order_whatever_its_shuffling():
    data = TensorDataset(torch.from_numpy(X))
    target = wk.Target(samples=DataLoader(data, batch_size=500, shuffle=True))
    for _ in range(2):
        np.testing.assert_array_equal(rows(target.stream).x.numpy(), X)
    assert target.stream.rows == len(X) and repr(target).startswith("Target(dim=3, streamed in 1 part, n=21000")
    assert {len(block) for block in target.stream.parts[0].blocks()} == {500}
    torch.testing.assert_close(gaussian(target).loc, gaussian(wk.Target(samples=X)).loc, rtol=1e-12, atol=1e-12)
    chosen = Loaded(DataLoader(Subset(data, range(10, 20)), batch_size=3))
    np.testing.assert_array_equal(rows(chosen).x.numpy(), X[10:20])


def test_pairs_of_a_loader_are_y_given_x():
    x, y = torch.randn(50, 4), torch.arange(50)
    target = wk.Target.of(DataLoader(TensorDataset(x, y), batch_size=8))
    block = rows(target.stream)
    assert torch.equal(block.x, y[:, None].double()) and torch.equal(block.context, x.double())
    assert (target.dim, target.names, target.context_names) == (1, ("y",), ("x1", "x2", "x3", "x4"))
    assert "given 4 columns" in repr(target)


def test_a_loaders_own_collation_and_items_are_kept():
    stream = open_stream(DataLoader(list(range(10)), batch_size=4, collate_fn=lambda items: torch.tensor(items) * 2.0))
    assert rows(stream).x[:, 0].tolist() == [2.0 * i for i in range(10)]


class Noisy(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.randn(2) + index


class Counting(IterableDataset):
    def __init__(self, used_up):
        self.rows = iter(range(100)) if used_up else range(100)

    def __iter__(self):
        return (float(i) for i in self.rows)


def test_a_dataset_that_is_random_is_the_same_each_time_and_leaves_the_global_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    stream = open_stream(DataLoader(Noisy(), batch_size=7))
    first, second = rows(stream).x, rows(stream).x
    assert torch.equal(first, second) and len(first) == 20
    assert torch.equal(before, torch.get_rng_state())


def test_an_iterable_is_read_as_it_comes_and_refused_when_it_is_used_up():
    stream = open_stream(DataLoader(Counting(used_up=False), batch_size=30))
    assert rows(stream).x[:, 0].tolist() == list(range(100)) and stream.rows is None
    once = open_stream(DataLoader(Counting(used_up=True), batch_size=30))
    with pytest.raises(InputError, match="gives other rows when it is read again"):
        rows(once)


LOADERS = [
    (lambda: DataLoader(TensorDataset(torch.ones(9, 2)), sampler=WeightedRandomSampler(torch.ones(9), 9)), "chooses rows"),
    (lambda: DataLoader(TensorDataset(torch.ones(9, 2)), batch_sampler=[[0, 1]]), "chooses rows"),
    (lambda: DataLoader([{"a": 1.0}]), "is a `dict`"),
    (lambda: DataLoader([("a", 1.0, 2)]), "is a `list`"),
    (lambda: DataLoader(torch.ones(5, 3, 8, 8)), r"shape \(1, 3, 8, 8\)"),
    (lambda: DataLoader(TensorDataset(torch.ones(0, 2))), "gives no rows"),
    (lambda: DataLoader([torch.ones(2), torch.ones(3)]), "has 3 columns, and the first one 2"),
    (lambda: DataLoader([torch.ones(2), torch.tensor([1.0, float("nan")])]), r"batch 1 of the list, rows from 1\): .*x2"),
]


@pytest.mark.parametrize(("make", "message"), LOADERS)
def test_loaders_that_choose_or_give_no_rows_are_refused(make, message):
    with pytest.raises(InputError, match=message):
        rows(open_stream(make()))


def test_a_plain_sequential_sampler_is_no_choice():
    data = TensorDataset(torch.arange(6.0))
    assert rows(open_stream(DataLoader(data, sampler=SequentialSampler(data)))).x[:, 0].tolist() == list(range(6))


def test_only_streams_and_what_names_them_are_opened():
    with pytest.raises(InputError, match="a `int` is neither a path"):
        open_stream(3)
    with pytest.raises(InputError, match="it is empty"):
        Shards([])


def test_every_part_of_a_file_is_a_file_part(tmp_path):
    shutil.copy(write(tmp_path / "x.npy", X), tmp_path / "y.npy")
    assert all(isinstance(part, FilePart) for part in open_stream(tmp_path).parts)


def test_shards_that_share_an_order_do_not_share_their_held_out_rows(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(200):
        np.save(tmp_path / f"{i:03}.npy", (np.arange(10) * 3 + rng.normal(size=10))[:, None])
    values = [wk.fit(tmp_path, seed=seed).value for seed in range(2)]
    truth = 0.5 * np.log(2 * np.pi * np.e * (9 * 8.25 + 1))  # of one Gaussian on all rows
    assert values[0].value != values[1].value
    for value in values:
        assert abs(value.value - truth) < 4 * value.stderr

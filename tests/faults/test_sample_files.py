"""Sample files that are damaged, that lie, or that are far larger than they look: refused in one line, or read within bounds."""

import os
import struct

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest

import whichkl as wk
from programs import run, whichkl
from whichkl._checks import InputError, ResourceError, WhichklError
from whichkl.process import memory as memory_limits
from whichkl.samples import open_stream, opening, read_samples

X = np.random.default_rng(0).normal(size=(2_000, 2))


def table(x=X, names="ab"):
    return pa.table({name: x[:, i] for i, name in enumerate(names)})


def read_by_every_opener(path, folder):
    """Return what each way of reading a file raises, or None."""
    found = []
    for read in (wk.Target.of, wk.fit, read_samples, open_stream, lambda one: wk.estimate(p=one, q=X)):
        found.append(caught(read, path))
    folder.mkdir(exist_ok=True)
    (folder / path.name).write_bytes(path.read_bytes())
    found.append(caught(wk.fit, folder))
    return found


def caught(function, argument):
    try:
        function(argument)
    except WhichklError as error:
        return error
    return None


# Checksums of Parquet


def flipped(path, needle):
    data = bytearray(path.read_bytes())
    place = data.find(needle)
    assert place > 0
    data[place + 6] ^= 0x0F
    path.write_bytes(data)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_flipped_bit_under_a_checksum_is_found_by_every_opener_that_reads_rows(tmp_path, version):
    path = tmp_path / "x.parquet"
    plain = {"use_dictionary": False, "compression": "none", "column_encoding": "PLAIN", "data_page_version": version}
    pyarrow.parquet.write_table(table(), path, write_page_checksum=True, **plain)
    intact = read_samples(path).values
    np.testing.assert_array_equal(intact, X)
    flipped(path, X[1_000, 1].tobytes())
    message = "column `b` of row group 0 is broken .*CRC checksum verification failed"
    for read in (wk.Target.of, wk.fit, read_samples, lambda one: wk.estimate(p=one, q=X), lambda one: wk.fit(one.parent)):
        with pytest.raises(InputError, match=message):
            read(path)
    for command in (["fit", path], ["advise", path], ["estimate", "--p", path, "--q", "Normal(0,1)"]):
        done = whichkl(*command, cwd=tmp_path)
        assert done.returncode == 2 and "CRC checksum" in done.stderr and "Traceback" not in done.stderr


def test_a_flipped_bit_in_a_dictionary_under_a_checksum_is_found(tmp_path):
    path = tmp_path / "x.parquet"
    few = np.round(X)
    pyarrow.parquet.write_table(table(few), path, write_page_checksum=True, compression="none")
    np.testing.assert_array_equal(read_samples(path).values, few)
    flipped(path, few[0, 0].tobytes())
    with pytest.raises(InputError, match="column `a` of row group 0 is broken"):
        read_samples(path)


def test_every_single_bit_of_a_small_parquet_with_checksums_is_refused_or_changes_nothing(tmp_path):
    path, x = tmp_path / "x.parquet", X[:8, :1]
    pyarrow.parquet.write_table(table(x, "a"), path, write_page_checksum=True)
    whole = path.read_bytes()
    for place in range(len(whole)):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            values = read_samples(path).values
        except WhichklError:
            continue
        np.testing.assert_array_equal(values, x, err_msg=f"byte {place}")


# Small files of very many rows


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    """Files of 40 million rows of two columns, 640 MB, in less than a megabyte."""
    folder = tmp_path_factory.mktemp("bombs")
    part = pa.table({"a": np.zeros(4_000_000), "b": np.ones(4_000_000)})
    with pyarrow.parquet.ParquetWriter(folder / "b.parquet", part.schema, compression="zstd") as file:
        for _ in range(10):
            file.write_table(part)
    for kind in ("zstd", "lz4"):
        options = pyarrow.ipc.IpcWriteOptions(compression=kind)
        with pyarrow.ipc.new_file(str(folder / f"{kind}.arrow"), part.schema, options=options) as file:
            for _ in range(10):
                file.write_table(part, max_chunksize=500_000)
    return folder


@pytest.mark.parametrize("name", ["b.parquet", "zstd.arrow", "lz4.arrow"])
def test_what_a_file_holds_decides_whether_it_is_streamed_not_its_size(bombs, name):
    assert (bombs / name).stat().st_size < 6_000_000
    target = wk.Target.of(bombs / name)
    assert target.samples is None and target.stream.rows == 40_000_000
    assert target.stream.bytes_in_memory == 640_000_000


@pytest.mark.parametrize("name", ["b.parquet", "zstd.arrow", "lz4.arrow"])
def test_a_bomb_is_read_within_bounds(bombs, name):
    code = f"""
import pyarrow as pa, whichkl as wk
try:
    wk.fit({str(bombs / name)!r})
except ValueError as error:
    print(error)
print(pa.default_memory_pool().max_memory())
"""
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    said, most = done.stdout.strip().splitlines()
    assert "are constant" in said
    assert int(most) < 200_000_000


def test_npy_and_csv_are_streamed_by_what_they_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "IN_MEMORY", 10_000)
    np.save(tmp_path / "x.npy", np.zeros((1_000, 2), dtype=np.int8))
    (tmp_path / "x.csv").write_text("a,b\n" + "1,2\n" * 1_000)
    for name in ("x.npy", "x.csv"):
        assert (tmp_path / name).stat().st_size < 10_000
        assert wk.Target.of(tmp_path / name).stream is not None


def test_a_file_is_read_into_memory_where_something_goes_with_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "IN_MEMORY", 10_000)
    pyarrow.parquet.write_table(table(), tmp_path / "x.parquet")
    assert wk.Target.of(tmp_path / "x.parquet").stream is not None
    weighted = wk.Target(samples=tmp_path / "x.parquet", weights=np.ones(2_000))
    assert weighted.stream is None and weighted.names == ("a", "b")
    both = wk.Target(samples=tmp_path / "x.parquet", log_prob=lambda x: -x.square().sum(-1))
    assert both.samples.shape == (2_000, 2)


def test_what_needs_more_memory_than_is_free_is_refused_with_both_numbers(tmp_path, monkeypatch):
    pyarrow.parquet.write_table(table(), tmp_path / "x.parquet")
    pyarrow.feather.write_feather(table(), tmp_path / "x.arrow", compression="zstd")
    monkeypatch.setattr(memory_limits, "available_memory", lambda: 20_000.0)
    with pytest.raises(ResourceError, match="it takes at least .* of memory, and 20 kB are free"):
        read_samples(tmp_path / "x.parquet")
    with pytest.raises(ResourceError, match="smaller record batches"):
        open_stream(tmp_path / "x.arrow")


def test_an_arrow_file_is_opened_without_decompressing_it(tmp_path):
    path = tmp_path / "x.arrow"
    pyarrow.feather.write_feather(table(), path, compression="lz4", chunksize=300)
    stream = open_stream(path)
    assert [part.count for part in stream.shards[0].parts(1)] == [300] * 6 + [200]
    assert pyarrow.ipc.open_file(path).num_record_batches == 7


# Headers of NPY


def npy(path, shape, data=bytes(64), descr="'<f8'", order="False", version=1, length=None, magic=b"\x93NUMPY"):
    header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    header += b" " * (-(11 + len(header)) % 64) + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(header) if length is None else length)
    path.write_bytes(magic + bytes([version, 0]) + size + header + data)
    return path


HEADERS = {
    "2**64 rows": {"shape": "(18446744073709551616, 2)"},
    "a truth": {"shape": "(True, 4)", "data": bytes(32)},
    "many rows": {"shape": "(10000000000000, 2)"},
    "few rows": {"shape": "(3, 2)"},
    "many columns": {"shape": "(2, 10000000000000)"},
    "many empty columns": {"shape": "(0, 10000000000000)", "data": b""},
    "negative": {"shape": "(-4, -2)"},
    "a fraction": {"shape": "(4.0, 2)"},
    "a text": {"shape": "('4', 2)"},
    "a list": {"shape": "[4, 2]"},
    "nested": {"shape": "((4, 2), 1)"},
    "deep": {"shape": "(" * 500 + ")" * 500},
    "minus minus": {"shape": "-" * 5_000 + "1"},
    "a call": {"shape": "__import__('os').system('true')"},
    "no axes": {"shape": "()", "data": bytes(8)},
    "three axes": {"shape": "(2, 2, 2)"},
    "9000 digits": {"shape": f"({'9' * 4_000}, {'9' * 4_000})"},
    "objects": {"shape": "(4, 2)", "descr": "'|O'"},
    "texts": {"shape": "(4, 2)", "descr": "'<U2'"},
    "complex": {"shape": "(4,)", "descr": "'<c16'"},
    "dates": {"shape": "(8,)", "descr": "'<M8[s]'"},
    "records": {"shape": "(4,)", "descr": "[('a', '<f8'), ('b', '<f8')]"},
    "records in a text": {"shape": "(4,)", "descr": "'f8,f8'"},
    "blocks": {"shape": "(4,)", "descr": "('<f8', (2,))"},
    "no such type": {"shape": "(4,)", "descr": "'<f3'"},
    "no order": {"shape": "(4, 2)", "order": "None"},
    "long header": {"shape": "(4, 2)", "version": 2, "length": 2**32 - 1},
    "longer header": {"shape": "(4, 2)", "length": 60_000},
    "short header": {"shape": "(4, 2)", "length": 5},
    "no such version": {"shape": "(4, 2)", "version": 9},
    "another file": {"shape": "(4, 2)", "magic": b"PK\x03\x04NU"},
    "too short": {"shape": "(8, 1)", "data": bytes(63)},
    "too long": {"shape": "(8, 1)", "data": bytes(65)},
}


@pytest.mark.parametrize("name", HEADERS)
def test_an_npy_header_that_lies_is_refused_by_every_opener(tmp_path, name):
    path = npy(tmp_path / "x.npy", **HEADERS[name])
    for error in read_by_every_opener(path, tmp_path / "folder"):
        assert isinstance(error, InputError) and len(str(error)) < 700 and "\n" not in str(error)


def test_npy_headers_of_all_versions_orders_and_of_python_2_are_read(tmp_path):
    x = np.arange(8.0)
    for options in ({"version": 2}, {"version": 3}, {"shape": "(4L, 2L)"}):
        path = npy(tmp_path / "x.npy", **{"shape": "(4, 2)", "data": x.tobytes(), **options})
        np.testing.assert_array_equal(read_samples(path).values, x.reshape(4, 2))
    path = npy(tmp_path / "x.npy", "(4, 2)", x.tobytes(), order="True")
    np.testing.assert_array_equal(read_samples(path).values, x.reshape(2, 4).T)
    path = npy(tmp_path / "x.npy", "(8,)", x.tobytes(), descr="'>f8'")
    np.testing.assert_array_equal(read_samples(path).values, x.view(">f8").astype(float)[:, None])


def test_an_archive_of_arrays_is_refused_by_its_name_and_by_its_bytes(tmp_path):
    np.savez(tmp_path / "x.npz", X)
    with pytest.raises(InputError, match="its suffix is `.npz`"):
        wk.Target.of(tmp_path / "x.npz")
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(InputError, match="isn't a whole NPY file"):
        wk.Target.of(tmp_path / "x.npy")


def test_a_sparse_file_of_one_endless_row_is_refused(tmp_path):
    path = npy(tmp_path / "x.npy", f"(1, {10**9})", data=b"")
    os.truncate(path, path.stat().st_size + 8 * 10**9)
    with pytest.raises(InputError, match="1,000,000,000 columns"):
        wk.Target.of(path)


# Texts of CSV

LONG = "x" * 200_000
TEXTS = {
    "a long field": (f'a,b\n1,2\n3,"{LONG}"\n', "line 3 can't be parsed .field larger than field limit"),
    "a long name": (f"a,{LONG}\n1,2\n", "line 1 can't be parsed"),
    "a long number": (f"a,b\n1,{'1' * 200_000}x\n", "line 2 can't be parsed"),
    "a long line": ("a,b\n" + "1," * 5_000_000 + "1\n", "line 2 has more than 4,194,304 characters"),
    "a long first line": ("1," * 5_000_000 + "1\n", "line 1 has more than 4,194,304 characters"),
    "many columns": (",".join(f"c{i}" for i in range(200_000)) + "\n", "it has 200,000 columns"),
    "many empty columns": ("," * 200_000 + "\n1\n", "it has 200,001 columns"),
    "a quote that isn't closed": ('a,b\n1,"2\n' + "3,4\n" * 50_000, "line .* can't be parsed .* quote isn't closed"),
    "a short quote that isn't closed": ('a,b\n1,"2\n3,4\n', r"read .*x.csv`"),
    "a quote in the header": ('"a,b\n1,2\n' + "3,4\n" * 50_000, "line .* can't be parsed .* quote isn't closed"),
    "a NUL": ("a,b\n1,2\n3,\0\n", "line 3 has a NUL"),
    "a NUL in a name": ("a,b\0\n1,2\n", "line 1 has a NUL"),
    "nothing but NULs": ("\0" * 5_000, "line 1 has a NUL"),
    "UTF-16": ("a,b\n1,2\n".encode("utf-16"), "line 1 has a NUL"),
    "UTF-16 without a mark": ("a,b\n1,2\n".encode("utf-16-le"), "line 1 has a NUL"),
    "UTF-32": ("a,b\n1,2\n".encode("utf-32"), "line 1 "),
    "Latin-1": ("größe,b\n1,2\n".encode("latin-1"), "line 1 isn't UTF-8"),
    "far down": (b"a,b\n" + b"1,2\n" * 5_000 + b"\xff,2\n", "line 5002 isn't UTF-8"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_csv_that_no_parser_takes_is_refused_with_its_line(tmp_path, name):
    text, message = TEXTS[name]
    path = tmp_path / "x.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for read in (wk.Target.of, open_stream, read_samples):
        with pytest.raises(InputError, match=message) as error:
            read(path)
        assert len(str(error.value)) < 500


def test_a_csv_of_a_thousand_wide_rows_and_one_with_old_line_ends_are_read(tmp_path):
    wide = np.random.default_rng(0).integers(0, 9, (3, 20_000))
    np.savetxt(tmp_path / "wide.csv", wide, fmt="%d", delimiter=",")
    np.testing.assert_array_equal(read_samples(tmp_path / "wide.csv").values, wide)
    (tmp_path / "old.csv").write_bytes(b"a,b\r1,2\r3,4\r")
    np.testing.assert_array_equal(read_samples(tmp_path / "old.csv").values, [[1, 2], [3, 4]])


# Names, folders and tables of very many columns


def test_a_table_of_very_many_columns_is_refused_and_a_wide_one_is_read(tmp_path):
    names = [f"c{i}" for i in range(200_000)]
    pyarrow.feather.write_feather(pa.table([pa.array([1.0])] * len(names), names=names), tmp_path / "x.arrow")
    with pytest.raises(InputError, match="it has 200,000 columns, and a table can have at most 131,072"):
        wk.Target.of(tmp_path / "x.arrow")
    wide = pa.table([pa.array([1.0])] * 5_000, names=names[:5_000])
    pyarrow.feather.write_feather(wide, tmp_path / "y.arrow")
    pyarrow.parquet.write_table(wide, tmp_path / "y.parquet")
    np.save(tmp_path / "y.npy", np.ones((1, 300_000)))
    assert [open_stream(tmp_path / f"y.{kind}").first.x.shape[1] for kind in ("arrow", "parquet", "npy")] == [
        5_000,
        5_000,
        300_000,
    ]


def test_many_doubled_names_are_named_by_a_few(tmp_path):
    names = [f"c{i // 2}" for i in range(20_000)]
    pyarrow.feather.write_feather(pa.table([pa.array([1.0])] * len(names), names=names), tmp_path / "x.arrow")
    with pytest.raises(InputError, match="appear twice") as error:
        wk.Target.of(tmp_path / "x.arrow")
    assert len(str(error.value)) < 300


PATHS = [
    "",
    "x",
    "x.csv",
    "x" * 5_000 + ".csv",
    "a\0b.csv",
    "pipe.csv",
    "folder.csv",
    "loop.csv",
    "dangling.npy",
    "/dev/null",
    "/dev/zero",
]


@pytest.mark.parametrize("name", PATHS, ids=lambda name: repr(name)[:12])
def test_a_path_that_names_no_file_of_samples_is_refused_at_once(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.csv")
    os.mkdir("folder.csv")
    os.symlink("loop.csv", "loop.csv")
    os.symlink("nowhere", "dangling.npy")
    for read in (wk.Target.of, wk.fit, read_samples, open_stream):
        with pytest.raises(InputError):
            read(name)


def test_the_first_version_of_feather_is_refused_by_its_name(tmp_path):
    (tmp_path / "x.feather").write_bytes(b"FEA1" + bytes(100) + b"FEA1")
    with pytest.raises(InputError, match="the first version of Feather"):
        wk.Target.of(tmp_path / "x.feather")


def test_footers_that_tell_of_other_rows_or_types_are_refused(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(table(), path, compression="none", use_dictionary=False)
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little")
    start = len(whole) - 8 - footer
    refused = 0
    for place in range(start, len(whole) - 8, 3):
        data = bytearray(whole)
        data[place] ^= 2
        path.write_bytes(data)
        try:
            np.testing.assert_array_equal(read_samples(path).values, X)
        except WhichklError:
            refused += 1
    assert refused > footer // 12


# What a command says


@pytest.mark.parametrize("name", ["x.npy", "x.csv", "x.parquet", "x.arrow", "x.feather"])
def test_a_command_refuses_bytes_of_no_format_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(bytes(range(128, 256)) * 40)
    for command in (["fit", name], ["advise", name], ["estimate", "--p", name, "--q", name]):
        done = whichkl(*command, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("error: Cannot read") and "Traceback" not in done.stderr


def test_estimates_read_folders_and_large_files(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "IN_MEMORY", 10_000)
    (tmp_path / "d").mkdir()
    np.save(tmp_path / "d" / "x.npy", X[:1_000])
    np.save(tmp_path / "d" / "y.npy", X[1_000:])
    np.save(tmp_path / "z.npy", X)
    values = [wk.estimate(p=one, q=X + 1).value for one in (tmp_path / "d", tmp_path / "z.npy", X)]
    assert values[0] == values[1] == values[2]

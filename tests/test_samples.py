"""Sample files, real ones: what is read, and the messages about those that can't be."""

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

import whichkl as wk
from whichkl._checks import InputError
from whichkl.samples import read_samples

X = np.arange(12, dtype=np.float64).reshape(6, 2) ** 2


def write(folder, kind):
    path = folder / f"x.{kind}"
    table = pa.table({"a": X[:, 0], "b": X[:, 1]})
    if kind == "csv":
        path.write_text("a,b\n" + "\n".join(f"{p},{q}" for p, q in X) + "\n")
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind in ("feather", "arrow"):
        pyarrow.feather.write_feather(table, path)
    else:
        np.save(path, X)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet", "feather", "arrow", "npy"])
def test_every_format_gives_the_same_matrix(tmp_path, kind):
    table = read_samples(write(tmp_path, kind))
    np.testing.assert_array_equal(table.values, X)
    assert table.names == (("x1", "x2") if kind == "npy" else ("a", "b"))


@pytest.mark.parametrize("kind", ["parquet", "feather", "arrow", "npy"])
def test_a_truncated_file_is_refused(tmp_path, kind):
    path = write(tmp_path, kind)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="isn't a whole"):
        read_samples(path)


@pytest.mark.parametrize("kind", ["csv", "parquet", "feather", "npy"])
def test_an_empty_file_is_refused(tmp_path, kind):
    path = tmp_path / f"x.{kind}"
    path.touch()
    with pytest.raises(InputError, match="the file is empty"):
        read_samples(path)


CSV = [
    (
        "a,b\n1,2\n3,x\n",
        "column `b` holds text in 1 cell .line 3, `x`.*Pass `Target.samples=…, drop=..b...`, or correct these cells of `b`",
    ),
    ("a,b\n1,2\n\n\n3,setosa\n", "column `b` holds text in 1 cell .line 5, `setosa`"),
    ('a,b\n1,2\n3,"1,234"\n', "thousands separators in 1 cell .line 3, `1,234`.. Pass `Target.samples=…, thousands=','"),
    ('a,b\n1,"2,5"\n', "decimal commas in 1 cell .line 2, `2,5`.. Write numbers with a decimal point"),
    ("a,b\n1,2\n3\n", "line 3 has 1 fields and the first line has 2"),
    ("a,b\n1,2\n3,4,5\n", "line 3 has 3 fields"),
    ("a,b\n1,2\na,b\n3,4\n", "line 3 repeats the header"),
    ("a,a\n1,2\n", r"column names \['a'\] appear twice"),
    ("a,b\n", "0 rows and 2 columns"),
    ("a;b\n1;2\n3;4\n", "separated by semicolons"),
    ("# made today\na,b\n1,2\n", "first line is a comment"),
    (",a,b\n0,1,2\n1,3,4\n", "a column has no name"),
    (
        "a,b\n2020-01-01,2\n2020-01-02,2\n",
        "column `a` holds dates or times in 2 cells .lines 2, 3, such as `2020-01-01`.*or write `a` as numbers",
    ),
]


@pytest.mark.parametrize(("text", "message"), CSV)
def test_a_bad_csv_is_refused_with_its_line_and_column(tmp_path, text, message):
    path = tmp_path / "x.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_samples(path)


def test_a_csv_without_header_a_byte_order_mark_and_missing_cells_are_understood(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("1,2\n3,4\n5,7\n")
    assert read_samples(path).names == ("x1", "x2")
    assert read_samples(path).values.shape == (3, 2)
    path.write_bytes(b"\xef\xbb\xbfa,b\n1,2\n3,4\n")
    assert read_samples(path).names == ("a", "b")
    path.write_text("a,b\n1,2\n3,\n")
    with pytest.raises(
        InputError, match=r"column `b` is missing or NaN in 1 cell \(line 3\). Pass `Target.samples=…, missing='drop'"
    ):
        wk.Target.of(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"a,b\n1,\xff\xfe\n")
    with pytest.raises(InputError, match="read"):
        read_samples(path)


def test_text_columns_of_parquet_and_pickled_arrays_are_refused(tmp_path):
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pa.table({"a": [1.0], "name": ["x"]}), path)
    with pytest.raises(InputError, match="column `name` holds text in 1 cell .row 0, `x`"):
        read_samples(path)
    np.save(tmp_path / "x.npy", np.array([object()]), allow_pickle=True)
    with pytest.raises(InputError, match="isn't a whole NPY file of numbers"):
        read_samples(tmp_path / "x.npy")


def test_other_suffixes_folders_and_integers(tmp_path):
    with pytest.raises(InputError, match=r"its suffix is `.txt`. Use one of .csv"):
        read_samples(tmp_path / "x.txt")
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(InputError, match="it is a folder"):
        read_samples(tmp_path / "d.csv")
    np.save(tmp_path / "i.npy", np.arange(5))
    assert read_samples(tmp_path / "i.npy").values.dtype == np.float64


def test_the_petals_are_fishers():
    target = wk.problems.petals()
    assert tuple(target.samples.shape) == (150, 2)
    assert target.samples.mean(0).tolist() == pytest.approx([3.758, 1.199333], abs=1e-6)
    assert target.names == ("petal length cm", "petal width cm")

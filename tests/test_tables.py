"""Tables as they are: columns, missing cells, separators and categories, the same from files, streams and DataFrames."""

import datetime
import decimal
import warnings

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
import xarray

import whichkl as wk
from programs import whichkl
from whichkl._checks import InputError
from whichkl.families import Autoregressive, Categorical, Gaussian, Product
from whichkl.samples import Shards, open_stream
from whichkl.samples.reading import Reading
from whichkl.samples.stream import joined

N = 1_000
RNG = np.random.default_rng(0)
CITY = RNG.choice(["Rome", "Oslo", "Lima"], N)
AMOUNT = np.round(np.exp(RNG.normal(7, 1, N)), 2)
AGE = np.where(np.arange(N) % 50 == 7, np.nan, np.round(RNG.normal(40, 10, N), 1))
OPTIONS = {"drop": ["note"], "categories": ["city"], "missing": "drop", "thousands": ","}
KEPT = ~np.isnan(AGE)
MATRIX = np.column_stack([np.searchsorted(["Lima", "Oslo", "Rome"], CITY), AMOUNT, AGE])[KEPT]


def frame():
    amount = [f"{one:,.2f}" for one in AMOUNT]
    return pd.DataFrame({"note": [f"no. {i}" for i in range(N)], "city": CITY, "amount": amount, "age": AGE})


def write(path, table):
    if path.suffix == ".csv":
        table.to_csv(path, index=False)
    else:
        arrow = pa.Table.from_pandas(table, preserve_index=False)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(arrow, path, row_group_size=130)
        else:
            pyarrow.feather.write_feather(arrow, path, chunksize=130)
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow", "frame", "categorical frame"])
def test_every_source_gives_the_same_codes_numbers_and_rows(tmp_path, kind):
    table = frame()
    if kind == "categorical frame":
        table["city"] = table.city.astype("category")
    samples = table if "frame" in kind else write(tmp_path / f"x.{kind}", table)
    target = wk.Target(samples=samples, **OPTIONS)
    np.testing.assert_array_equal(target.samples.numpy(), MATRIX)
    assert target.names == ("city", "amount", "age")
    assert target.reading.categories == {"city": ("Lima", "Oslo", "Rome")}
    codes = "the codes of `city` are 0 Lima, 1 Oslo, 2 Rome"
    assert target.notes == ("rows left out, since a cell is missing: 20 of 1,000", codes)


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow"])
def test_a_folder_is_streamed_to_the_same_rows_and_its_labels_are_those_of_all_files(tmp_path, kind):
    for i, rows in enumerate((slice(0, 300), slice(300, N))):
        write(tmp_path / f"{i}.{kind}", frame()[rows])
    target = wk.Target(samples=tmp_path, **OPTIONS)
    assert isinstance(target.stream, Shards) and target.stream.rows is None
    x = joined([block for part in target.stream.parts for block in part.blocks()]).x
    np.testing.assert_array_equal(x.numpy(), MATRIX)
    assert target.notes[0] == "rows left out, since a cell is missing: 20"
    family = Product(("categorical", "lognormal", "normal"))  # a stream chooses margins by its first block alone
    streamed, whole = wk.fit(target, family), wk.fit(wk.Target(samples=frame(), **OPTIONS), family)
    assert streamed.family == whole.family == Product(family.margins, categories=(3, None, None))
    point = torch.from_numpy(MATRIX[:5])
    assert float((streamed.model.log_prob(point) - whole.model.log_prob(point)).abs().max()) < 1e-9


def test_every_row_knows_its_place_where_rows_are_left_out(tmp_path):
    stream = open_stream(write(tmp_path / "x.parquet", frame()), Reading.of(columns=["age"], missing="drop"))
    (part,) = stream.parts
    numbers = np.concatenate([numbers for _, numbers in part.numbered()])
    np.testing.assert_array_equal(numbers, np.flatnonzero(KEPT))
    text = 'a,b\n1,"two\nlines"\n\n,x\n3,y\n-4,z\n'
    (tmp_path / "x.csv").write_text(text)
    (part,) = open_stream(tmp_path / "x.csv", Reading.of(columns=["a"], missing="drop")).parts
    assert next(numbers for _, numbers in part.numbered()).tolist() == [2, 6, 7]
    with pytest.raises(InputError, match="1 of 3 rows lie outside the support, first line 7"):
        wk.Target(samples=tmp_path / "x.csv", columns=["a"], missing="drop", support="positive")
    with pytest.raises(InputError, match="column `a` holds −4 in line 7, and `poisson` takes"):
        wk.fit(wk.Target(samples=tmp_path / "x.csv", columns=["a"], missing="drop"), Product("poisson"))


FAULTS = [
    (
        {"categories": ["city"]},
        "`note` holds text .*`amount` has thousands .*`age` is missing.*drop=..note.., missing='drop', tho",
    ),
    (
        {"columns": ["age"]},
        r"`age` is missing or NaN in 20 cells \((lines 9, 59, 109|rows 7, 57, 107), …\). Pass `Target.samples=…, missing='drop'",
    ),
    ({**OPTIONS, "drop": []}, r"column `note` holds text in 1,000 cells .*Pass `Target.samples=…, drop=\['note'\]"),
]


@pytest.mark.parametrize("kind", ["csv", "parquet", "arrow", "frame"])
@pytest.mark.parametrize(("options", "message"), FAULTS)
def test_all_faults_of_all_columns_are_named_at_once(tmp_path, kind, options, message):
    samples = frame() if kind == "frame" else write(tmp_path / f"x.{kind}", frame())
    with pytest.raises(InputError, match=message):
        wk.Target(samples=samples, **options)


@pytest.mark.parametrize("kind", ["csv", "parquet", "frame"])
def test_a_column_without_any_cell_is_to_be_dropped(tmp_path, kind):
    empty = frame().assign(note=np.nan)[["note", "age"]]
    samples = empty if kind == "frame" else write(tmp_path / f"x.{kind}", empty)
    with pytest.raises(InputError, match=r"ass `Target\(samples=…, drop=\['note'\], missing='drop'\)`"):
        wk.Target(samples=samples)


CELLS = [
    ("1,234.5", 1234.5),
    ("-12,345,678", -12345678.0),
    (" 7 ", 7.0),
    ("1e3", 1000.0),
    ("12,34", None),
    ("1,23,456", None),
    ("1,2345", None),
    (",123", None),
]


@pytest.mark.parametrize(("cell", "value"), CELLS)
def test_a_separator_counts_only_between_groups_of_three_digits(tmp_path, cell, value):
    (tmp_path / "x.csv").write_text(f'a,b\n"{cell}",1\n5,2\n')
    if value is None:
        with pytest.raises(InputError, match=r"column `a` .*line 2"):
            wk.Target(samples=tmp_path / "x.csv", thousands=",")
    else:
        assert wk.Target(samples=tmp_path / "x.csv", thousands=",").samples[0, 0] == value


CALLS = [
    ({"columns": ["ag"]}, "there is no column `ag`, but `note`, `city`, `amount`, `age`"),
    ({"drop": ["note", "x", "y"]}, "there are no columns `x`, `y`, but"),
    ({"columns": ["age", "age"]}, "names a column twice"),
    ({"columns": ["age"], "drop": "age"}, "no column is left"),
    ({"columns": ["age"], "categories": ["city"]}, "the category `city` isn't among the columns that are used"),
    ({"missing": "ignore"}, "it is 'refuse' or 'drop'"),
    ({"thousands": "."}, "it separates no thousands"),
    ({**OPTIONS, "chains": 4}, "rows are left out, and the others are in no order of time"),
    ({**OPTIONS, "support": {"agee": "positive"}}, "there is no column `agee`, but `city`, `amount`, `age`"),
]


@pytest.mark.parametrize(("options", "message"), CALLS)
def test_options_that_fit_no_table_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        wk.Target(samples=frame(), **options)


def test_arrays_pairs_and_loaders_have_no_text():
    x = RNG.normal(size=(50, 3))
    x[4, 1] = np.nan
    target = wk.Target(samples=x, drop=["x3"], missing="drop", weights=np.arange(50.0))
    np.testing.assert_array_equal(target.samples.numpy(), np.delete(x, 4, 0)[:, :2])
    assert target.weights.tolist() == [float(i) for i in range(50) if i != 4]
    with pytest.raises(InputError, match="Pass a DataFrame or a file"):
        wk.Target(samples=x, categories=["x1"])
    with pytest.raises(InputError, match="samples are pairs"):
        wk.Target(samples=(x, x), missing="drop")
    with pytest.raises(InputError, match="a `TensorDataset` gives rows of numbers"):
        wk.Target(samples=torch.utils.data.TensorDataset(torch.zeros(3, 2)), missing="drop")


def test_only_families_with_categories_take_them():
    target = wk.Target(samples=frame(), **OPTIONS)
    with pytest.raises(InputError, match="its columns are numbers, and `city` holds categories. Use `product`"):
        wk.fit(target, Gaussian())
    both = wk.Target(samples=frame().assign(town=CITY), **{**OPTIONS, "categories": ["city", "town"]})
    with pytest.raises(InputError, match="`city`, `town` hold categories"):
        wk.fit(both, Gaussian())
    with pytest.raises(InputError, match="column `city` holds categories, and its margin is `normal`"):
        wk.fit(target, Product("normal"))
    with pytest.raises(InputError, match="column `city` of x holds categories"):
        wk.fit(wk.Target(samples=frame(), given=["city", "age"], **OPTIONS), "linear_gaussian")
    alone = wk.Target(samples=frame()[["city"]], categories=["city"])
    shares = wk.fit(alone, Categorical()).model.base_dist.probs
    assert shares.reshape(-1).tolist() == pytest.approx([(CITY == one).mean() for one in ("Lima", "Oslo", "Rome")])
    assert Autoregressive().with_categories((3,), ("city",)) == Autoregressive()


def test_a_label_of_one_row_makes_the_held_out_value_infinite_and_the_note_says_what_helps():
    table = frame()[["city", "age"]].fillna({"age": 40.0})
    table.loc[3, "city"] = "Atlantis"
    target = wk.Target(samples=table, categories="city")
    fit = wk.fit(target)
    assert fit.value.value == np.inf and "use Product(smoothing=1.0), or drop such rows" in fit.diagnostics.notes[-1]
    assert wk.fit(target, Product(smoothing=1.0)).value.value < 10


def test_a_column_of_one_label_has_one_category():
    target = wk.Target(samples=frame().assign(city="Rome"), **OPTIONS)
    assert any("`city` holds 1 category: categorical" in note for note in wk.fit(target).diagnostics.notes)


def test_labels_of_numbers_are_in_the_order_of_numbers_and_whole_ones_have_one_spelling():
    table = pd.DataFrame({"code": [10.0, 2.0, np.nan, 10.0], "y": [1.0, 2.0, 3.0, 4.0]})
    target = wk.Target(samples=table, categories="code", missing="drop")
    assert target.reading.categories == {"code": ("2", "10")} and target.samples[:, 0].tolist() == [1, 0, 1]


def test_a_saved_fit_remembers_how_its_table_was_read(tmp_path):
    fit = wk.fit(wk.Target(samples=frame(), **OPTIONS))
    fit.save(tmp_path / "fit")
    assert wk.Fit.load(tmp_path / "fit").reading == fit.reading
    assert wk.Fit.load(tmp_path).reading == fit.reading  # the folder of `whichkl fit --out` has it in `fit`
    wk.fit(MATRIX[:, 1:]).save(tmp_path / "plain")
    assert wk.Fit.load(tmp_path / "plain").reading == Reading()
    assert '"reading"' not in (tmp_path / "plain" / "fit.json").read_text()


def test_supports_are_given_per_column_in_python_on_the_command_line_and_in_studies(tmp_path):
    table = frame().drop(columns=["note", "city"]).assign(amount=AMOUNT, age=np.nan_to_num(AGE, nan=40.0))
    write(tmp_path / "x.csv", table)
    target = wk.Target(samples=table, support={"amount": "positive"})
    assert target.bijection.describe() == ["positive", "real"]
    done = whichkl("fit", "x.csv", "--support", "amount=positive", "--support", "age=greater_than(-9)", "--json", cwd=tmp_path)
    assert '"positive",\n  "greater_than(-9.0)"' in done.stdout
    both = whichkl("fit", "x.csv", "--support", "amount=positive", "--support", "real", cwd=tmp_path)
    assert both.returncode == 2 and "Write one support, or COLUMN=SUPPORT each time" in both.stderr
    table = "samples: y.csv, support: {amount: positive}, missing: drop, thousands: ',', categories: [city], drop: [note]"
    write(tmp_path / "y.csv", frame())
    (tmp_path / "study.yaml").write_text(f"target: {{{table}}}\nseeds: 2\nfamilies: [product]\n")
    compared = whichkl("compare", "study.yaml", "--out", "out", cwd=tmp_path)
    assert compared.returncode == 0, compared.stderr


def test_a_wrong_table_of_a_study_is_named_with_its_line(tmp_path):
    write(tmp_path / "y.csv", frame())
    (tmp_path / "study.yaml").write_text("target: y.csv\nseeds: 2\n")
    refused = whichkl("compare", "study.yaml", "--out", "out", cwd=tmp_path)
    assert refused.returncode == 2 and "study.yaml, line 1: Cannot read" in refused.stderr
    assert "Pass `Target(samples=…, categories=['city'], drop=['note'], missing='drop', thousands=',')`" in refused.stderr


def test_the_support_that_a_note_proposes_is_of_the_columns_that_need_it():
    skewed = pd.DataFrame({"price": np.exp(RNG.normal(0, 1, N)), "mu": RNG.normal(size=N)})
    for x, given in ((skewed, "support={'price': 'positive'}"), (skewed[["price"]], "support='positive'")):
        (note,) = [one for one in wk.fit(x, Gaussian()).diagnostics.notes if "keeps it inside" in one]
        assert given in note


def test_a_column_that_numbers_the_rows_is_noted():
    def notes(x):
        return [one for one in wk.fit(x).diagnostics.notes if "as an index does" in one]

    table = frame().assign(row=np.arange(N) * 3 + 7)
    (note,) = notes(wk.Target(samples=table, **OPTIONS))  # rows with a missing cell are left out
    assert note.startswith("`row`: ")
    assert not notes(MATRIX[:, 1:]) and not notes(np.sort(AMOUNT)) and not notes(RNG.poisson(3.0, 500).astype(float))


def test_only_missing_cells_are_to_be_left_out_as_missing():
    for x, has_missing in (([1.0, np.nan, np.inf, 2.0], True), ([1.0, np.inf, -np.inf, 2.0], False)):
        with pytest.raises(InputError, match="Drop or repair those rows") as refused:
            wk.Target(samples=x)
        assert ("missing='drop'" in str(refused.value)) is has_missing


def test_a_series_is_a_table_of_one_column():
    city, age = frame()["city"], frame()["age"].dropna()
    fit = wk.fit(wk.Target(samples=city, categories=["city"]))
    assert fit.names == ("city",) and fit.summary().rows[0]["name"] == "city = Lima"
    # four losses that repeat have no heavy tail, however rare the largest is
    assert fit.value.reliable and not fit.findings
    with pytest.raises(InputError, match=r"column `city` holds text .*categories=\['city'\]"):
        wk.fit(city)
    assert wk.fit(age).names == ("age",) and wk.fit(age.rename(None)).names == ("x1",)


def test_a_column_that_appears_twice_is_named():
    table = frame().rename(columns={"age": "amount"})
    with pytest.raises(InputError, match="column `amount` appears twice. Rename one of them"):
        wk.Target(samples=table, categories=["city"])


class OnlyStream:
    """What any Arrow library gives: a PyCapsule stream, and nothing else."""

    def __init__(self, table):
        self.table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


class OnlyInterchange:
    """The older protocol between libraries of DataFrames."""

    def __init__(self, table):
        self.table = table

    def __dataframe__(self, *args, **kwargs):
        return self.table.__dataframe__(*args, **kwargs)


class OnlyArray:
    """An array of any other library."""

    def __init__(self, values):
        self.values = values

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype=dtype)


Z = np.random.default_rng(1).normal(size=(60, 2))
ARROW = pa.table({"a": Z[:, 0], "b": Z[:, 1]})
TIMES = pd.date_range("2025-01-01", periods=60)


@pytest.mark.parametrize(
    "table",
    [
        ARROW,
        ARROW.to_batches()[0],
        pa.concat_tables([ARROW.slice(0, 20), ARROW.slice(20)]),
        OnlyStream(ARROW),
        OnlyInterchange(ARROW),
        pd.DataFrame(Z, columns=["a", "b"]),
        pd.DataFrame(Z, columns=["a", "b"]).convert_dtypes(dtype_backend="pyarrow"),
    ],
    ids=["table", "batch", "chunks", "stream", "interchange", "pandas", "pandas of arrow"],
)
def test_tables_of_any_library(table):
    target = wk.Target(samples=table)
    assert target.names == ("a", "b") and target.samples.tolist() == Z.tolist()
    assert wk.Target(samples=table, drop=["a"]).names == ("b",)
    assert wk.Target(samples=table, names=["u", "v"]).names == ("u", "v")
    pairs = wk.Target(samples=table, given="a")
    assert (pairs.context_names, pairs.names) == (("a",), ("b",))
    fit = wk.fit(table, judge=False)
    assert fit.score(table).log_density.tolist() == fit.score(Z).log_density.tolist()
    assert wk.estimate(p=table, q=torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))).n == 60


@pytest.mark.parametrize(
    "column",
    [
        pa.array(Z[:, 0]),
        pa.chunked_array([Z[:20, 0], Z[20:, 0]]),
        pd.Series(Z[:, 0]),
        xarray.DataArray(Z[:, 0]),
        OnlyArray(Z[:, 0]),
    ],
    ids=["array", "chunks", "series", "xarray", "array protocol"],
)
def test_columns_of_any_library(column):
    assert wk.Target.of(column).samples[:, 0].tolist() == Z[:, 0].tolist()
    pair = wk.Target(samples=(column, column))
    assert pair.context[:, 0].tolist() == Z[:, 0].tolist()


def test_pairs_of_tables_keep_their_names():
    target = wk.Target(samples=(ARROW.select(["a"]), ARROW.select(["b"])))
    assert (target.context_names, target.names) == (("a",), ("b",))


NO_NUMBERS = {
    "Series of dates": (pd.Series(TIMES), "holds dates or times"),
    "index of dates": (TIMES, "holds dates or times"),
    "Series of time differences": (pd.Series(TIMES - TIMES[0]), "holds dates or times"),
    "DataFrame with time differences": (pd.DataFrame({"a": Z[:, 0], "t": TIMES - TIMES[0]}), "column `t` holds dates or times"),
    "table with time differences": (pa.table({"a": Z[:, 0], "t": TIMES - TIMES[0]}), "column `t` holds dates or times"),
    "Series of complex numbers": (pd.Series(Z[:, 0] + 1j), "holds complex numbers"),
    "DataFrame with complex numbers": (pd.DataFrame({"a": Z[:, 0], "z": Z[:, 0] + 1j}), "column `z` holds complex numbers"),
    "Series of digits": (pd.Series(["1.5", "2.5"] * 30), "holds text"),
    "Series of periods": (pd.Series(TIMES.to_period("D")), "column `x1`"),
    "Series of intervals": (pd.Series(pd.interval_range(0, 60)), "holds text"),
    "table of text": (pa.table({"a": Z[:, 0], "s": ["x"] * 60}), "column `s` holds text"),
    "null in Arrow": (pa.array([1.0, None, 3.0]), "is missing or NaN in 1 cell"),
    "large integers with a null": (pa.array([2**60 + 1, None, 3]), "integers that float64 can't hold"),
    "array of times": (np.array(TIMES), "Give times as numbers"),
    "array of time differences": (np.array(TIMES - TIMES[0]), "Give times as numbers"),
    "xarray of times": (xarray.DataArray(TIMES), "Give times as numbers"),
    "list of dates": ([datetime.date(2025, 1, 1)] * 5, "row 0 holds a `date`"),
    "list of time differences": ([datetime.timedelta(1)] * 5, "row 0 holds a `timedelta`"),
    "list with None": ([1.0, None, 2.0], "row 1 holds a `NoneType`"),
    "list of decimals": ([decimal.Decimal(1)] * 5, r"Convert them by `np.array\(x, dtype=float\)`"),
    "masked": (np.ma.masked_less(np.r_[Z[:, 0], -9999.0], -100), "1 of their numbers are masked"),
    "ragged": ([[1.0, 2.0], [3.0]], "their rows have different lengths"),
    "pair in a list": ([Z, Z[:, 0]], r"give a tuple \(x, y\)"),
    "records": (np.zeros(5, dtype=[("a", int), ("b", float)]), "one column of numbers per field"),
    "bytes": (np.array([b"1"]), "not a number"),
    "no columns": (pd.DataFrame(), "it has no columns"),
    "no rows": (pa.table({"a": pa.array([], pa.float64())}), "they are empty"),
    "class": (pd.DataFrame, "it is a class"),
    "Dataset": (xarray.Dataset({"a": ("i", Z[:, 0])}), "can't be read as an array"),
    "sparse": (torch.eye(3).to_sparse(), "the tensor is sparse"),
    "meta": (torch.zeros(5, 2, device="meta"), "holds no numbers"),
    "dict": ({"a": Z[:, 0]}, "a dict has no order"),
    "no array": (np.float64(3.0), r"shape \(\)"),
    "four axes": (np.zeros((2, 2, 2, 2)), r"shape \(2, 2, 2, 2\)"),
}


@pytest.mark.parametrize("samples", NO_NUMBERS)
def test_what_holds_no_real_numbers_is_refused(samples):
    samples, message = NO_NUMBERS[samples]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a cast that loses something
        for call in (wk.Target.of, lambda x: wk.Target(samples=x), lambda x: wk.estimate(p=x, q=Z[:, 0])):
            with pytest.raises(InputError) as caught:
                call(samples)
            assert str(caught.value).startswith("Cannot ")
        with pytest.raises(InputError, match=message):
            wk.Target.of(samples)

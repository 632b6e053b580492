"""Files changed at random: each is refused by an error of ours or read, nothing hangs, and no checksum is passed over.

The slow test takes a hundred thousand files; the quick one takes the first of them.
"""

import io
import os
import random
import signal
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from whichkl._checks import WhichklError
from whichkl.distillation.job import read_job
from whichkl.samples import open_stream, read_samples
from whichkl.study.config import read_plan

X = np.random.default_rng(0).normal(size=(60, 3))
_SECONDS = 30
"""Longest that one file may take: a page that claims 2 GB takes ten on a busy machine."""


def written(write):
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def parquet(table, **options):
    return written(lambda stream: pyarrow.parquet.write_table(table, stream, **options))


def feather(table, kind):
    return written(lambda stream: pyarrow.feather.write_feather(table, stream, compression=kind, chunksize=20))


def originals():
    """Return whole files by their names; the name's end is the format's suffix."""
    table = pa.table({name: X[:, i] for i, name in enumerate("abc")})
    mixed = pa.table(
        {
            "whole": np.arange(60),
            "single": X[:, 0].astype("f4"),
            "flag": X[:, 1] > 0,
            "missing": pa.array([1.5, None] * 30),
            "exact": pa.array([1] * 60, pa.decimal128(9, 2)),
        }
    )
    lines = [",".join(map(repr, row)) for row in X.tolist()]
    found = {f"{kind}.parquet": parquet(table, compression=kind, row_group_size=20) for kind in ("none", "snappy", "zstd", "lz4")}
    found |= {f"{kind}.arrow": feather(table, kind) for kind in ("uncompressed", "zstd", "lz4")}
    found |= {f"mixed-{kind}.feather": feather(mixed, kind) for kind in ("uncompressed", "zstd")}
    return found | {
        "plain.parquet": parquet(table, use_dictionary=False, compression="none"),
        "split.parquet": parquet(table, use_dictionary=False, data_page_version="2.0", column_encoding="BYTE_STREAM_SPLIT"),
        "mixed.parquet": parquet(mixed),
        "c.npy": written(lambda stream: np.save(stream, X)),
        "f.npy": written(lambda stream: np.save(stream, np.asfortranarray(X.astype("f4")))),
        "x.csv": ("a,b,c\n" + "\n".join(lines) + "\n").encode(),
        "quoted.csv": ('a,"b"\n' + "\n".join(f'"{i}",{"true" if i % 2 else "false"}' for i in range(30)) + "\n").encode(),
    }


def checked():
    """Return files whose bytes are under checksums, by their names."""
    table = pa.table({name: X[:, i] for i, name in enumerate("abc")})
    return {
        "crc.parquet": parquet(table, write_page_checksum=True, row_group_size=20),
        "crc-plain.parquet": parquet(table, write_page_checksum=True, use_dictionary=False, compression="none"),
        "crc-2.parquet": parquet(table, write_page_checksum=True, data_page_version="2.0", compression="zstd"),
    }


NUMBERS = (2**20, 2**31 - 1, 2**31, 2**32 - 1, 10**13, 2**40, 2**63 - 1, 2**64 - 1)
TEXTS = (b'"', b"\0", b",,", b"\r", b"\xff", b"\n\n", b'"\n"', b"nan", b"1e999", b";", "\u2028".encode())
YAML = (
    *(
        "&a ",
        "*a",
        "!!binary ",
        "!x ",
        "? ",
        "- ",
        "[",
        "{",
        "]",
        "}",
        ": ",
        "'",
        '"',
        "@",
        "`",
        ",",
        "|\n",
        "\t",
        "\0",
        "\x85",
        "# ",
    ),
    *(
        "\n---\n",
        "\n...\n",
        "\n  ",
        "<<: ",
        "%YAML 1.1\n",
        "2001-01-01",
        "1:30:00",
        "0x1F",
        "1e999",
        "9" * 30,
        ".inf",
        ".nan",
        "-1",
    ),
    *("~", "null", "yes"),
)


def generator(seed):
    return random.Random(seed)  # noqa: S311


def mutated(data, rng, texts=()):
    """Flip, overwrite, cut, repeat or move some bytes, most of them near the ends, where metadata lie."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        n, where = len(data), rng.random()
        if n < 2:
            break
        place = (
            rng.randrange(min(n, 200))
            if where < 0.35
            else n - 1 - rng.randrange(min(n, 900))
            if where < 0.75
            else rng.randrange(n)
        )
        size, kind = rng.randrange(1, 64), rng.randrange(8)
        if kind == 0:
            data[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[place] = rng.choice([0, 1, 127, 128, 255])
        elif kind == 2:
            del data[place:]
        elif kind == 3:
            del data[place : place + size]
        elif kind == 4:
            data[place:place] = data[place : place + size]
        elif kind == 5 and texts:
            data[place:place] = rng.choice(texts)
        elif kind == 6:
            width = rng.choice([4, 8])
            data[place : place + width] = (rng.choice(NUMBERS) % 256**width).to_bytes(width, "little")
        else:
            start = rng.randrange(n)
            data[place : place + size] = data[start : start + size]
    return bytes(data)


class Hung(BaseException):
    """A file took too long; no reader catches it."""


@contextmanager
def bounded():
    def end(*_):
        raise Hung

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(_SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(read, path):
    """Return what a reader returns, or None where it refuses in one line; whatever else it raises is a failure."""
    with bounded():
        try:
            return read(path)
        except WhichklError as error:
            assert "\n" not in str(error) and len(str(error)) < 3_000
            return None


def streamed(path):
    return sum(len(block) for part in open_stream(path).parts for block in part.blocks())


def try_samples(folder, seed, count):
    rng, read = generator(seed), 0
    whole = list(originals().items())
    for i in range(count):
        name, data = whole[i % len(whole)]
        path = folder / f"x{os.path.splitext(name)[1]}"
        path.write_bytes(mutated(data, rng, TEXTS if name.endswith("csv") else ()))
        try:
            read += outcome(streamed if i // len(whole) % 2 else read_samples, path) is not None
        except BaseException as error:
            path.rename(folder / f"failed-{i}-{name}")
            raise AssertionError(f"seed {seed}, file {i}, `{folder / f'failed-{i}-{name}'}`") from error
    return read


def try_checksums(folder, seed, count):
    rng, read, path = generator(seed), 0, folder / "x.parquet"
    whole = list(checked().items())
    for i in range(count):
        data = bytearray(whole[i % len(whole)][1])
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        found = outcome(read_samples, path)
        if found is not None:
            read += 1
            np.testing.assert_array_equal(found.values, X, err_msg=f"seed {seed}, file {i}")
    return read


STUDIES = (
    "target: bimodal\nfamilies: [gaussian, 'mixture:2']\nobjectives: [forward_kl, reverse_kl]\nseeds: 3\nbudget: 2000\n",
    "target:\n  problem: many_well\n  arguments: {dim: 4}\nobjectives: reverse_kl\nmetrics: [khat]\nheld_out: 0.2\n",
    "target: 0.5*Normal(-3,1) + 0.5*Normal(3,1)\nseeds: [1, 2]\ndraws: 1000\n",
    "target: rows.csv\nfamilies: gaussian\nobjectives: forward_kl\n",
    "teacher: nets.py:teacher\nstudent: nets.py:Student\ndata: nets.py:data\nepochs: 5\nobjective: jeffreys:0.3\n",
)


def try_yaml(folder, seed, count):
    rng, read, path = generator(seed), 0, folder / "x.yaml"
    (folder / "rows.csv").write_bytes(originals()["x.csv"])
    texts = [text.encode() for text in YAML]
    for i in range(count):
        text = STUDIES[i % len(STUDIES)]
        path.write_bytes(mutated(text.encode(), rng, texts * 3))
        try:
            read += outcome(read_job if text.startswith("teacher") else read_plan, path) is not None
        except BaseException as error:
            raise AssertionError(f"seed {seed}, file {i}: {path.read_bytes()!r}") from error
    return read


@pytest.mark.parametrize(("attempt", "count"), [(try_samples, 1_000), (try_checksums, 300), (try_yaml, 500)])
def test_some_files_changed_at_random(tmp_path, attempt, count):
    assert 0 < attempt(tmp_path, 0, count) < count


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
@pytest.mark.parametrize(("attempt", "count"), [(try_samples, 7_000), (try_checksums, 2_000), (try_yaml, 1_000)])
def test_a_hundred_thousand_files_changed_at_random(tmp_path, attempt, count, seed):
    assert 0 < attempt(tmp_path, seed, count) < count

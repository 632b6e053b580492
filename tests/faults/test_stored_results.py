"""What is read back is checked: saves, journals and studies that were changed by a flipped bit, by hand, or by somebody else."""

import hashlib
import json
import random
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import whichkl as wk
from programs import whichkl
from whichkl._checks import InputError, IntegrityError, WhichklError
from whichkl.distillation import Distillation, LanguageDistillation, sequence_kl
from whichkl.files.journal import Journal
from whichkl.files.reading import checked, read_json
from whichkl.files.saving import checksum
from whichkl.fitting import _identity
from whichkl.study import Study
from whichkl.verifying import verify

D = torch.float64
STUDY = {"families": ["gaussian", "gaussian:diagonal"], "objectives": "forward_kl", "seeds": 2, "metrics": ["khat"], "draws": 200}


def rows(n=120, d=2, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=D)


def pairs():
    x = rows()
    return x, x @ torch.tensor([[1.0], [2.0]], dtype=D) + 0.1 * rows(d=1, seed=1)


def study(out, seed=0, **changes):
    return wk.compare(wk.Target(samples=rows(seed=seed)), **{**STUDY, "out": out, **changes})


SAVED = {
    "gaussian": lambda: wk.fit(rows()),
    "diagonal": lambda: wk.fit(rows(), "gaussian:diagonal", judge=False),
    "low_rank": lambda: wk.fit(rows(d=4), wk.families.Gaussian("low_rank", rank=2), judge=False),
    "mixture": lambda: wk.fit(rows(), "mixture:2", judge=False),
    "student_t": lambda: wk.fit(rows(), "student_t", judge=False),
    "product": lambda: wk.fit(rows().exp(), wk.families.Product("gamma"), judge=False),
    "categories": lambda: wk.fit(rows().sign().clamp(min=0), "product", judge=False),
    "positive": lambda: wk.fit(wk.Target(samples=rows().exp(), support="positive"), judge=False),
    "pairs": lambda: wk.fit(pairs(), "linear_gaussian", judge=False),
    "reverse": lambda: wk.fit(wk.problems.bimodal(), objective="reverse_kl"),
    "autoregressive": lambda: wk.fit(rows().sign().clamp(min=0), "autoregressive", judge=False),
}


class Unigram(nn.Module):
    """A language model of two tokens that ignores those before; token 0 ends a sequence."""

    config = type("Config", (), {"eos_token_id": 0})

    def __init__(self, *chances):
        super().__init__()
        self.row = nn.Parameter(torch.tensor(chances).log())

    def forward(self, input_ids):
        return self.row.expand(*input_ids.shape, -1)


def language_distillation():
    found = sequence_kl(teacher=Unigram(0.5, 0.5), student=Unigram(0.7, 0.3), prompts=[[1]] * 4, max_new_tokens=2)
    settings = {"objective": "forward_kl", "prefixes": {"data": 1.0}, "credit": "token"}
    return LanguageDistillation(Unigram(0.7, 0.3), found, found, settings, 3, 1e6, 0.1, (0.5, 0.4))


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """One saved fit of each kind of family, made once."""
    folder = tmp_path_factory.mktemp("kept")
    for name, make in SAVED.items():
        make().save(folder / name)
    result = wk.distill(teacher=nn.Linear(2, 3), student=nn.Linear(2, 3), data=rows().float(), epochs=1)
    result.save(folder / "distillation")
    language_distillation().save(folder / "language")
    return folder


def loaded(folder):
    if (folder / "distillation.json").exists():
        return Distillation.load(folder, student=nn.Linear(2, 3))
    if (folder / "language_distillation.json").exists():
        return LanguageDistillation.load(folder, student=Unigram(0.5, 0.5))
    return wk.Fit.load(folder)


def forged(source, folder, change_fields=None, change_tensors=None):
    """Copy a save with changed content, and checksums that fit it."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    path = next(folder.glob("*.json"))
    fields = json.loads(path.read_text())
    del fields["checksum"]
    if change_tensors is not None:
        old = folder / fields["weights"]
        tensors = load(old.read_bytes())
        change_tensors(tensors)
        try:
            weights = save({name: value.contiguous() for name, value in tensors.items()})
        except KeyError as error:
            pytest.skip(f"safetensors before 0.7 can't write {error}")
        fields["sha256"] = hashlib.sha256(weights).hexdigest()
        old.write_bytes(weights)
    if change_fields is not None:
        change_fields(fields)
    path.write_text(json.dumps({**fields, "checksum": checksum(fields)}))
    return folder


@pytest.mark.parametrize("name", [*SAVED, "distillation", "language"])
def test_an_intact_save_loads_and_is_whole(kept, name):
    assert str(loaded(kept / name))
    (whole,) = verify(kept / name)
    assert whole.finished and str(whole).startswith(f"The {whole.kind} in")


def _set(place, value):
    def change(fields):
        *path, last = place.split(".")
        for step in path:
            fields = fields[int(step)] if isinstance(fields, list) else fields[step]
        if value is KeyError:
            del fields[last]
        else:
            fields[last] = value

    return change


FIELDS = [
    *(("format", value) for value in (0, -1, None, "1", 1.5, True, [1])),
    *(("family", value) for value in ({}, 3, "Gaussian", {"family": "Nothing"}, {"family": "Gaussian", "covariance": "round"})),
    ("family", {"family": "Flow", "hidden": [10**9]}),
    ("family", {"family": "Gaussian", "size": 4}),
    *(("objective", value) for value in (None, "kl", 7, ["forward_kl"])),
    *(("status", value) for value in ("done", 3, None)),
    *(("findings", value) for value in (["no_such_finding"], "x", [3])),
    *(("names", value) for value in ([], ["x"], ["x", "x"], ["x", 3], "xy", ["a", "b", "c"])),
    *(("support", value) for value in (None, 3, ["nowhere"], ["interval(2, 1)"], ["real", "real", "real"], [["real"]])),
    *(("seed", value) for value in (-1, 0.5, "0", None, True)),
    *(("access", value) for value in (3, "magic", None)),
    *(("value", value) for value in (None, 3, {}, {"quantity": "x"})),
    *(("value.value", value) for value in ("large", None, [1])),
    ("value.up_to", "log_x"),
    ("value.extra", 1),
    ("diagnostics", {}),
    ("diagnostics.optima", []),
    ("diagnostics.optima", [{"loss": 1.0, "converged": True, "is_global": True}] * 9),
    ("diagnostics.optima.0.loss", "low"),
    ("diagnostics.iterations", "many"),
    ("diagnostics.history", [[1]]),
    ("diagnostics.curve", [[1]]),
    ("diagnostics.elbo", {"quantity": "elbo"}),
    ("diagnostics.evaluations", {"rows": "many"}),
    *((name, KeyError) for name in ("format", "family", "value", "diagnostics", "names", "support", "seed", "access")),
    ("weights", "../../etc/passwd"),
    ("weights", 5),
    ("sha256", 0),
]


@pytest.mark.parametrize(("place", "value"), FIELDS, ids=lambda one: str(one)[:40])
def test_a_forged_field_is_damage(kept, tmp_path, place, value):
    with pytest.raises(IntegrityError, match="Cannot (load|rebuild)"):
        wk.Fit.load(forged(kept / "gaussian", tmp_path / "f", _set(place, value)))


NAN = torch.tensor(float("nan"), dtype=D)
TENSORS = [
    ("gaussian", "0.loc", lambda one: one * NAN),
    ("gaussian", "0.loc", lambda one: one[:1]),
    ("gaussian", "0.loc", lambda one: one.to(torch.complex64)),
    ("gaussian", "0.scale_tril", lambda one: -one),
    ("gaussian", "0.scale_tril", lambda one: one * 0),
    ("gaussian", "0.scale_tril", lambda one: one + float("inf")),
    ("gaussian", "0.scale_tril", lambda one: one[:, :1]),
    ("gaussian", "0.scale_tril", lambda one: one + 1),
    ("gaussian", "0.scale_tril", None),
    ("diagonal", "0.scale", lambda one: -one),
    ("diagonal", "0.scale", lambda one: one.repeat(2)),
    ("low_rank", "0.cov_diag", lambda one: -one),
    ("low_rank", "0.cov_factor", lambda one: one[:-1]),
    ("mixture", "0.probs", lambda one: one * 0 + torch.tensor([5.0, -4.0], dtype=D)),
    ("mixture", "0.probs", lambda one: one * 2),
    ("mixture", "0.probs", lambda one: one[:1]),
    ("mixture", "0.loc", lambda one: one[:1]),
    ("student_t", "0.df", lambda one: -one),
    ("student_t", "0.df", lambda one: one.repeat(3)),
    ("product", "0.0.gamma.rate", lambda one: -one),
    ("product", "0.0.gamma.concentration", lambda one: one * NAN),
    ("product", "0.1.gamma.rate", None),
    ("categories", "0.0.bernoulli.probs", lambda one: one + 2),
    ("pairs", "0.bias", lambda one: one.repeat(2)),
    ("pairs", "0.scale_tril", lambda one: -one),
    ("autoregressive", "0.shape", lambda one: one * 10**9),
    ("autoregressive", "0.module.net.0.weight", lambda one: one[:-1]),
    ("autoregressive", "0.module.net.0.weight", lambda one: one * NAN.float()),
    ("autoregressive", "0.module.net.0.weight", None),
]


@pytest.mark.parametrize(("name", "tensor", "change"), TENSORS)
def test_a_forged_parameter_is_damage(kept, tmp_path, name, tensor, change):
    def apply(tensors):
        assert tensor in tensors, sorted(tensors)
        if change is None:
            del tensors[tensor]
        else:
            tensors[tensor] = change(tensors[tensor])

    with pytest.raises(IntegrityError, match="isn't what was saved|the weights are another module's"):
        wk.Fit.load(forged(kept / name, tmp_path / "f", None, apply))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((name, KeyError) for name in ("history", "scores", "settings", "notes", "loss", "epochs", "best_epoch")),
        *(("scores", value) for value in ({}, None, [], {"rows": 3})),
        *(("history", value) for value in (None, [], [[1]], [["a", "b"]], "x")),
        *(("best_epoch", value) for value in (-1, 99, 0.5, "0")),
        *(("settings", value) for value in (None, [], {})),
        ("scores.forward_kl.value", None),
        ("notes", "x"),
        ("weights", 5),
        ("format", 0),
        ("status", None),
    ],
    ids=lambda one: str(one)[:40],
)
def test_a_forged_distillation_is_damage(kept, tmp_path, place, value):
    with pytest.raises(IntegrityError):
        loaded(forged(kept / "distillation", tmp_path / "f", _set(place, value)))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *((name, KeyError) for name in ("history", "before", "after", "settings", "notes", "steps", "flops", "midway", "model")),
        *(("settings", value) for value in (None, [], {}, {"objective": 3, "prefixes": {}, "credit": "token"})),
        *(("settings.prefixes", value) for value in (None, {"data": "all"}, 3)),
        *(("after.cut", value) for value in ({}, {"teacher": 0.1}, None)),
        *(("after.measures", value) for value in (None, {"length": 3})),
        *(("midway", value) for value in ([1], [{"step": 1}], None)),
        *(("examples", value) for value in ([{"prompt": 3}], "x")),
        ("steps", -1),
        ("before.forward_kl.value", None),
        ("weights", 5),
    ],
    ids=lambda one: str(one)[:40],
)
def test_a_forged_language_distillation_is_damage(kept, tmp_path, place, value):
    with pytest.raises(IntegrityError):
        loaded(forged(kept / "language", tmp_path / "f", _set(place, value)))


def test_nan_weights_of_a_distillation_are_damage(kept, tmp_path):
    def apply(tensors):
        tensors["weight"] = tensors["weight"] * float("nan")

    with pytest.raises(IntegrityError, match="NaN"):
        loaded(forged(kept / "distillation", tmp_path / "f", None, apply))


@pytest.mark.parametrize("name", ["gaussian", "distillation", "language"])
@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"{", b"[]", b"null", b"3", b'"text"', b"\xff\xfe", b"{}", b'{"format": 1}', b"NaN"),
        *(b"[" * 300_000, b'{"a":' * 300_000, b"9" * 10_000, b'{"format": 1, "format": 1}'),
    ],
    ids=lambda one: str(one[:12]),
)
def test_nonsense_in_the_place_of_json_is_damage(kept, tmp_path, name, text):
    shutil.copytree(kept / name, tmp_path / "f")
    next((tmp_path / "f").glob("*.json")).write_bytes(text)
    with pytest.raises(IntegrityError):
        loaded(tmp_path / "f")
    with pytest.raises(IntegrityError):
        verify(tmp_path / "f")


@pytest.mark.parametrize("name", ["gaussian", "distillation", "language"])
def test_a_folder_in_a_files_place_is_damage(kept, tmp_path, name):
    for pattern in ("*.json", "*.safetensors"):
        shutil.rmtree(tmp_path / "f", ignore_errors=True)
        shutil.copytree(kept / name, tmp_path / "f")
        path = next((tmp_path / "f").glob(pattern))
        path.unlink()
        path.mkdir()
        with pytest.raises(IntegrityError, match="isn't a file"):
            loaded(tmp_path / "f")


def mutated(data, rng):
    """Flip, cut, double, remove or overwrite a piece."""
    data = bytearray(data)
    i, size = rng.randrange(max(1, len(data))), rng.choice((1, 2, 8, 64))
    kind = rng.randrange(6)
    if kind == 0:
        data[i] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[i:]
    elif kind == 2:
        data[i:i] = data[i : i + size]
    elif kind == 3:
        del data[i : i + size]
    elif kind == 4:
        data[i : i + size] = rng.randbytes(size)
    else:
        data[i : i + 1] = rng.choice((b"-", b"null", b"[", b"1e999", b'"', b"{}", b"99999999999999999999"))
    return bytes(data)


def fuzz(kept, tmp_path, count, seed):
    """Mutate saves, half of them with checksums that fit; each either is an error of ours, or loads to what it was."""
    rng = random.Random(seed)  # noqa: S311
    names = [*SAVED, "distillation", "language"]
    folder = tmp_path / "f"
    originals = {name: {one.name: one.read_bytes() for one in (kept / name).iterdir()} for name in names}
    outcomes = {"refused": 0, "loaded": 0}
    for i in range(count):
        name = names[i % len(names)]
        files = dict(originals[name])
        weights, described = sorted(files, key=lambda one: one.endswith(".json"))
        is_forged = rng.random() < 0.5
        which = rng.choice((weights, described))
        files[which] = mutated(files[which], rng)
        if is_forged:
            files = resealed(files, weights, described)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for one, data in files.items():
            (folder / one).write_bytes(data)
        try:
            result = loaded(folder)
        except WhichklError:
            outcomes["refused"] += 1
            continue
        outcomes["loaded"] += 1
        assert str(result) and result.to_dict()
        assert is_forged or json.loads(files[described]) == json.loads(originals[name][described]), (name, which)
    return outcomes


def resealed(files, weights, described):
    """Give changed files the checksums that fit them, as somebody would who forges a save."""
    try:
        fields = json.loads(files[described])
        fields.pop("checksum", None)
        fields["sha256"] = hashlib.sha256(files[weights]).hexdigest()
        fields["weights"] = weights
        return {**files, described: json.dumps({**fields, "checksum": checksum(fields)}).encode()}
    except (ValueError, AttributeError, TypeError, RecursionError):
        return files


def test_mutated_saves_raise_nothing_else(kept, tmp_path):
    outcomes = fuzz(kept, tmp_path, 600, 0)
    assert outcomes["refused"] > 400


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_very_many_mutated_saves_raise_nothing_else(kept, tmp_path, seed):
    outcomes = fuzz(kept, tmp_path, 15_000, seed)
    assert outcomes["refused"] > 10_000


class TestReading:
    @pytest.mark.parametrize(
        "text", [b'{"a": NaN}', b"[1e999]", b"[Infinity]", b'{"a": 1, "a": 2}', b"[" * 10**5, b"{]", b"\x80", b""]
    )
    def test_json_that_is_not_plain_is_refused(self, text):
        with pytest.raises(ValueError):  # noqa: PT011
            read_json(text)

    @pytest.mark.parametrize(
        ("kind", "value"),
        [(int, True), (int, 1.0), (float, "one"), (float, True), (float, 10**400), (str, 1), (bool, 1), (tuple[int, ...], "12")],
    )
    def test_a_value_of_another_type_is_refused(self, kind, value):
        with pytest.raises(ValueError, match="place"):
            checked(kind, value, "place")


class Stop(Exception):  # noqa: N818
    """What stops a run in the middle, as a kill does."""


def distilled(folder, tell=None):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        teacher = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return wk.distill(
        teacher=teacher,
        student=lambda: nn.Linear(8, 4),
        data=torch.randn(300, 8, generator=torch.Generator().manual_seed(0)),
        epochs=8,
        learning_rate=0.02,
        journal=folder,
        patience=None,
        tell=tell,
    ).student.weight.clone()


def stop_halfway(step, done):
    if done >= 0.5:
        raise Stop


class TestJournals:
    @pytest.fixture
    def entry(self, tmp_path):
        """A journal that a stopped distillation left, and the answer of one that wasn't stopped."""
        whole = distilled(tmp_path / "other")
        with pytest.raises(Stop):
            distilled(tmp_path / "j", stop_halfway)
        return next((tmp_path / "j").glob("*/*.safetensors")), whole

    @pytest.mark.parametrize("at", [0.02, 0.3, 0.5, 0.7, 0.99])
    def test_a_flipped_bit_is_passed_over_and_logged(self, entry, at, tmp_path, caplog):
        path, whole = entry
        data = bytearray(path.read_bytes())
        (size,) = struct.unpack("<Q", data[:8])
        data[8 + size + int((len(data) - 9 - size) * at)] ^= 0x40
        path.write_bytes(bytes(data))
        assert torch.equal(distilled(tmp_path / "j"), whole)
        assert "isn't what was written" in caplog.text

    @pytest.mark.parametrize("change", ["notes", "round", "history", "shape", "name", "adam"])
    def test_an_entry_that_was_forged_whole_is_passed_over(self, entry, change, tmp_path, caplog):
        path, whole = entry
        journal = Journal(path.parent.parent, path.parent.name)
        tensors, notes = journal.load("distillation", lambda tensors, notes: (tensors, notes))
        if change == "notes":
            notes = {}
        elif change == "round":
            notes["round"] = "many"
        elif change == "history":
            notes["history"] = [1, 2]
        elif change == "shape":
            tensors["now.weight"] = tensors["now.weight"][:, :1]
        elif change == "name":
            tensors["best.weights"] = tensors.pop("best.weight")
        else:
            tensors["adam.7.exp_avg"] = torch.zeros(3)
        journal.save("distillation", tensors, notes)
        assert torch.equal(distilled(tmp_path / "j"), whole)
        assert "isn't what was written" in caplog.text

    def test_an_intact_entry_is_resumed_from(self, entry, tmp_path):
        _, whole = entry
        seen = []
        assert torch.equal(distilled(tmp_path / "j", lambda step, done: seen.append(done)), whole)
        assert seen[1] > 0  # it didn't begin again

    def test_a_journal_belongs_to_one_density_and_one_version(self, monkeypatch):
        def identity(f, **more):
            return _identity(wk.Target(log_prob=f, dim=2, **more), wk.families.Gaussian(), None, None, 0)

        first = identity(lambda x: -x.square().sum(-1))
        assert identity(lambda x: -x.square().sum(-1)) == first
        assert identity(lambda x: -(x - 3).square().sum(-1)) != first
        assert identity(lambda x: -x.square().sum(-1) - 1e-4 * x[:, 0].clamp(min=4)) != first
        assert identity(lambda x: -x.square().sum(-1), score=lambda x: -2.001 * x) != first
        monkeypatch.setattr("whichkl.fitting.run.code_version", lambda: "whichkl 0.0.0")
        assert identity(lambda x: -x.square().sum(-1)) != first


class TestStudies:
    def test_a_foreign_cell_is_not_taken_for_ones_own(self, tmp_path):
        ours, theirs = study(tmp_path / "a"), study(tmp_path / "b", seed=1)
        shutil.rmtree(ours.cells[0].folder)
        shutil.copytree(theirs.cells[0].folder, ours.cells[0].folder)
        for attempt in (lambda: study(tmp_path / "a"), lambda: Study.load(tmp_path / "a"), lambda: verify(tmp_path / "a")):
            with pytest.raises(IntegrityError, match="the cell of another study"):
                attempt()
        assert study(tmp_path / "a", recompute=True).rows == ours.rows

    def test_a_cell_of_a_study_with_other_seeds_is_noticed(self, tmp_path):
        study(tmp_path / "a"), study(tmp_path / "more", seeds=4)
        shutil.copytree(tmp_path / "more" / "cells", tmp_path / "a" / "cells", dirs_exist_ok=True)
        for attempt in (lambda: Study.load(tmp_path / "a"), lambda: verify(tmp_path / "a")):
            with pytest.raises(IntegrityError, match="isn't one of this study"):
                attempt()

    @pytest.mark.parametrize("content", ["", '{"format": 1, "tar', "null", "[" * 2000, "\x00\x01"])
    def test_a_study_file_that_is_no_json_is_damaged_not_foreign(self, tmp_path, content):
        found = study(tmp_path / "a")
        (tmp_path / "a" / "study.json").write_text(content)
        with pytest.raises(IntegrityError, match="recompute"):
            verify(tmp_path / "a")
        assert study(tmp_path / "a", recompute=True).rows == found.rows
        (tmp_path / "a" / "study.json").write_text('{"mine": 1}')
        with pytest.raises(InputError, match="didn't write|isn't one that whichkl wrote"):
            study(tmp_path / "a", recompute=True)
        assert (tmp_path / "a" / "study.json").read_text() == '{"mine": 1}'

    def test_a_cell_under_anothers_key_is_noticed(self, tmp_path):
        found = study(tmp_path / "a")
        shutil.rmtree(found.cells[0].folder)
        shutil.copytree(found.cells[1].folder, found.cells[0].folder)
        with pytest.raises(IntegrityError, match="another cell of this one"):
            study(tmp_path / "a")

    @pytest.mark.parametrize(
        "text",
        ["[]", "{}", "null", "[" * 200_000, '{"files": {}, "seconds": 3}', '{"files": {"../../study.json": "x"}, "seconds": {}}'],
        ids=lambda one: one[:12],
    )
    def test_nonsense_in_done_is_damage(self, tmp_path, text):
        found = study(tmp_path / "a")
        (found.cells[0].folder / "DONE").write_text(text)
        with pytest.raises(IntegrityError, match="isn't what was written"):
            study(tmp_path / "a")
        assert study(tmp_path / "a", recompute=True).rows == found.rows

    def test_a_flipped_bit_anywhere_in_study_json_is_damage(self, tmp_path):
        found = study(tmp_path / "a")
        path = tmp_path / "a" / "study.json"
        whole = path.read_bytes()
        for i in range(0, len(whole), max(1, len(whole) // 60)):
            path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
            with pytest.raises(IntegrityError, match="--recompute"):
                study(tmp_path / "a")
        assert study(tmp_path / "a", recompute=True).rows == found.rows
        assert path.read_bytes() == whole

    def test_a_study_of_an_earlier_version_without_a_checksum_goes_on(self, tmp_path):
        found = study(tmp_path / "a")
        path = tmp_path / "a" / "study.json"
        fields = json.loads(path.read_text())
        del fields["checksum"]
        path.write_text(json.dumps(fields))
        assert study(tmp_path / "a").rows == found.rows

    def test_a_finished_study_takes_more_seeds_and_reruns_nothing(self, tmp_path):
        first = study(tmp_path / "a")
        written = {cell.key: (cell.folder / "DONE").stat().st_mtime_ns for cell in first.cells}
        more = study(tmp_path / "a", seeds=4)
        assert len(more.cells) == 8 and more.rows[:4] == first.rows
        assert {key: (tmp_path / "a" / "cells" / key / "DONE").stat().st_mtime_ns for key in written} == written
        assert more.rows == study(tmp_path / "b", seeds=4).rows
        with pytest.raises(InputError, match="seeds was"):
            study(tmp_path / "a", seeds=2)


class TestVerify:
    def run(self, folder, *arguments):
        return whichkl("verify", folder, *arguments)

    def test_what_is_whole_is_exit_zero(self, kept, tmp_path):
        study(tmp_path / "study")
        for folder, kind in ((kept / "mixture", "fit"), (kept / "distillation", "distillation"), (tmp_path / "study", "study")):
            found = self.run(folder, "--json")
            assert found.returncode == 0, found.stderr
            assert [one["kind"] for one in json.loads(found.stdout)["results"]] == [kind]

    def test_outputs_of_commands_are_found(self, tmp_path):
        np.save(tmp_path / "x.npy", rows().numpy())
        assert whichkl("fit", tmp_path / "x.npy", "--out", tmp_path / "out").returncode == 0
        found = self.run(tmp_path / "out")
        assert found.returncode == 0 and "The fit in" in found.stdout and "is whole" in found.stdout
        again = whichkl("fit", tmp_path / "x.npy", "--out", tmp_path / "out")
        assert again.returncode == 0 and "holds an earlier result. It is replaced" in again.stderr

    def test_a_link_in_the_place_of_a_result_is_refused(self, kept, tmp_path):
        np.save(tmp_path / "x.npy", rows().numpy())
        shutil.copytree(kept / "mixture", tmp_path / "elsewhere")
        before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "elsewhere").iterdir())
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "fit").symlink_to(tmp_path / "elsewhere")
        found = whichkl("fit", tmp_path / "x.npy", "--out", tmp_path / "out")
        assert found.returncode == 2 and "it is a link" in found.stderr
        assert sorted((path.name, path.read_bytes()) for path in (tmp_path / "elsewhere").iterdir()) == before

    def test_every_damaged_result_is_named(self, kept, tmp_path):
        for name, part in (("mixture", "fit"), ("distillation", "student")):
            shutil.copytree(kept / name, tmp_path / part)
            next((tmp_path / part).glob("*.safetensors")).unlink()
        found = self.run(tmp_path)
        assert found.returncode == 5 and f"{tmp_path / 'fit'}" in found.stderr and f"{tmp_path / 'student'}" in found.stderr

    @pytest.mark.parametrize("name", ["mixture", "distillation"])
    def test_every_flipped_byte_and_missing_file_is_exit_five(self, kept, tmp_path, name):
        shutil.copytree(kept / name, tmp_path / "f")
        for path in sorted((tmp_path / "f").iterdir()):
            whole = path.read_bytes()
            for i in range(0, len(whole), max(1, len(whole) // 20)):
                path.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
                with pytest.raises(IntegrityError):
                    verify(tmp_path / "f")
            path.unlink()
            with pytest.raises(IntegrityError, match="missing"):
                verify(tmp_path / "f")
            path.write_bytes(whole)
        next((tmp_path / "f").glob("*.json")).unlink()
        assert self.run(tmp_path / "f").returncode == 5

    @pytest.mark.parametrize("name", ["table.csv", "metrics.jsonl", "times.jsonl", "table.parquet", "study.json"])
    def test_a_changed_table_of_a_study_is_exit_five(self, tmp_path, name):
        study(tmp_path / "a")
        path = tmp_path / "a" / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
        with pytest.raises(IntegrityError):
            verify(tmp_path / "a")

    def test_an_interrupted_study_is_whole_and_not_finished(self, tmp_path):
        def stop(progress):
            if progress.done == 2:
                raise Stop

        with pytest.raises(Stop):
            study(tmp_path / "a", tell=stop)
        (whole,) = verify(tmp_path / "a")
        assert not whole.finished and "2 of 4 cells" in whole.checked

    def test_a_folder_without_a_result_is_exit_two(self, tmp_path):
        assert self.run(tmp_path).returncode == 2
        assert self.run(tmp_path / "nowhere").returncode == 2

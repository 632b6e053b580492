"""The stochastic solver: seeds, resuming, rows it may see, streams, weights, and runs that go wrong."""

import math
import signal
import time
from pathlib import Path

import pytest
import torch
from torch.distributions import Independent, Normal

from programs import Program, run
from whichkl._checks import InputError
from whichkl.families import Flow, Gaussian, MixtureDensityNetwork, Module, Neural, VariationalAutoencoder
from whichkl.files.journal import Journal
from whichkl.objectives import ForwardKL
from whichkl.samples import Block, Slice, Stream
from whichkl.solvers import Stochastic, solver_for
from whichkl.solvers.draws.batches import data_of
from whichkl.solvers.work import QUIET, Work
from whichkl.targets import Target

SHORT = Stochastic(steps=150, learning_rate=1e-2)


def _both(tensors, notes):
    return tensors, notes


def rows(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Bell(torch.nn.Module):
    def __init__(self, start: float = 0.0):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.full((2,), start, dtype=torch.float64))

    def forward(self):
        return Independent(Normal(self.loc, 1.0), 1)


class Pieces(Stream):
    """Rows in memory, said to be a stream."""

    def __init__(self, blocks):
        self.blocks = blocks
        self.names = ("x1", "x2")

    @property
    def parts(self):
        return [Slice(block) for block in self.blocks]

    @property
    def rows(self):
        return sum(map(len, self.blocks))


def weights(family, solution):
    return family.parameters(solution.best.model)


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", [Flow(transforms=1, hidden=(8,)), VariationalAutoencoder(1, (8,)), Module(Bell())])
def test_the_same_seed_gives_the_same_weights_and_touches_no_global_state(family):
    target = Target(samples=rows(300))
    torch.manual_seed(5)
    first = SHORT.solve(target, family, 3)
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))
    torch.manual_seed(99)
    assert same(weights(family, first), weights(family, SHORT.solve(target, family, 3)))
    assert not same(weights(family, first), weights(family, SHORT.solve(target, family, 4)))


def test_dropout_is_seeded_too_and_off_in_the_fitted_model():
    class Dropped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.map = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))

        def forward(self, x):
            return Normal(self.map(x)[:, 0], 1.0)

    torch.manual_seed(0)
    family, x = Module(Dropped()), rows(300)
    target = Target(samples=(x, x[:, 0]))
    first, second = SHORT.solve(target, family, 0), SHORT.solve(target, family, 0)
    assert same(weights(family, first), weights(family, second))
    assert torch.equal(first.best.model(x).mean, first.best.model(x).mean)


def test_held_out_rows_change_nothing_in_the_fit():
    x = rows(500)
    family = Flow(transforms=1, hidden=(8,))
    solution = SHORT.solve(Target(samples=x), family, 0, stride=5)
    held = solution.held.block.x
    assert 60 < len(held) < 140
    spoilt = x.clone()
    is_held = (x[:, None] == held).all(-1).any(1)
    spoilt[is_held] += 3
    again = SHORT.solve(Target(samples=spoilt), family, 0, stride=5)
    assert same(weights(family, solution), weights(family, again))
    data = data_of(Target(samples=x), family, 0, QUIET, 5, None)
    seen = torch.cat([data.validation.x, data.batches.block.x])
    assert len(seen) == 500 - len(held) and not (seen[:, None] == held).all(-1).any()
    assert solution.held.model is solution.best.model


def test_rows_of_weight_zero_count_for_nothing_and_whole_weights_are_copies():
    x = torch.cat([rows(1_000) + 2, rows(1_000, 1) - 50])
    w = torch.cat([torch.ones(1_000), torch.zeros(1_000)])
    model = Stochastic(steps=600, learning_rate=5e-2).solve(Target(samples=x, weights=w), Module(Bell()), 0).best.model
    assert torch.allclose(model.mean, x[:1_000].mean(0), atol=0.1)
    heavy = torch.cat([rows(1_000) + 2, rows(1_000, 1) - 2])
    w = torch.cat([torch.full((1_000,), 3.0), torch.ones(1_000)])
    model = Stochastic(steps=600, learning_rate=5e-2).solve(Target(samples=heavy, weights=w), Module(Bell()), 0).best.model
    assert torch.allclose(model.mean, (w.double() / w.sum()) @ heavy, atol=0.2)


def test_a_stream_is_fitted_as_the_same_rows_in_memory():
    x = rows(3_000) + torch.tensor([3.0, -1.0])
    blocks = [Block(one, torch.ones(len(one), dtype=torch.float64)) for one in x.split(700)]
    solver = Stochastic(steps=600, learning_rate=5e-2)
    stream = solver.solve(Target(samples=Pieces(blocks)), Module(Bell()), 0, stride=5)
    assert torch.allclose(stream.best.model.mean, x.mean(0), atol=0.1)
    assert 500 < len(stream.held.block) < 700
    again = solver.solve(Target(samples=Pieces(blocks)), Module(Bell()), 0, stride=5)
    assert torch.equal(stream.best.model.mean, again.best.model.mean)


def test_every_row_of_a_stream_comes_once_an_epoch_in_another_order_and_none_that_is_set_aside():
    x = torch.arange(9_000, dtype=torch.float64)[:, None] * torch.ones(2, dtype=torch.float64)
    blocks = [Block(one, torch.ones(len(one), dtype=torch.float64)) for one in x.split(1_000)]
    data = data_of(Target(samples=Pieces(blocks)), Flow(), 0, QUIET, 9, 5)
    batches = data.batches
    pieces = int(batches.per_epoch)
    assert pieces > 1
    epochs = [torch.cat([b.x[:, 0] for r in range(pieces) for b in batches.round(pieces * e + r)]) for e in range(2)]
    kept = set(x[:, 0].tolist()) - set(data.held.x[:, 0].tolist()) - set(data.validation.x[:, 0].tolist())
    for one in epochs:
        assert len(one) == len(set(one.tolist())) and set(one.tolist()) <= kept
        assert len(one) >= len(kept) - pieces * 2
    assert not torch.equal(epochs[0][:500], epochs[1][:500])
    assert not set(data.held.x[:, 0].tolist()) & set(data.validation.x[:, 0].tolist())
    assert 0.08 < len(data.validation) / 8_000 < 0.12
    assert abs(float(data.summary.mean[0]) - 4_500) < 150


def test_a_sampler_is_fitted_on_its_draws():
    target = Target(sampler=lambda n: torch.randn(n, 2, dtype=torch.float64) + 1, dim=2)
    model = Stochastic(steps=300, learning_rate=5e-2).solve(target, Module(Bell()), 0).best.model
    assert torch.allclose(model.mean, torch.ones(2, dtype=torch.float64), atol=0.05)


def test_early_stopping_comes_before_overfitting():
    x = rows(120)
    y = (torch.arange(120) % 2).double()  # noise
    solution = Stochastic(epochs=200, learning_rate=1e-2).solve(Target(samples=(x, y)), Neural("bernoulli", (64, 64)), 0)
    assert solution.best.converged and solution.iterations < 500
    fresh = rows(2_000, 7)
    loss = -torch.distributions.Bernoulli(logits=solution.best.model(fresh).logits).log_prob((torch.arange(2_000) % 2).double())
    assert float(loss.mean()) < 0.8


def test_a_schedule_that_is_too_short_is_not_converged():
    short = Stochastic(epochs=1, learning_rate=1e-3).solve(Target(samples=rows(2_000) + 3), Module(Bell()), 0)
    assert not short.best.converged
    long = Stochastic(steps=2_000, learning_rate=5e-2).solve(Target(samples=rows(2_000) + 3), Module(Bell()), 0)
    assert long.best.converged and long.best.loss < short.best.loss - 1


def test_epochs_are_as_many_as_said():
    target = Target(samples=rows(200))
    for epochs in (1, 3, 7):
        solver = Stochastic(epochs=epochs, learning_rate=1e-3, batch=30)
        assert solver.solve(target, Module(Bell()), 0).iterations == 6 * epochs  # 180 rows in batches of 30


def test_a_rate_that_is_too_large_never_ends_worse_than_the_start():
    target, family = Target(samples=rows(400)), Flow(transforms=1, hidden=(8,))
    start = Stochastic(epochs=1, learning_rate=1e-12).solve(target, family, 0).best.loss
    wild = Stochastic(steps=300, learning_rate=100.0, clip=1e9).solve(target, family, 0)
    assert wild.best.loss <= start + 0.05


class Breaks(Bell):
    """Gives NaN once its weight has moved far enough."""

    def forward(self):
        loc = self.loc * math.nan if bool((self.loc > 0.5).any()) else self.loc
        return Independent(Normal(loc, 1.0, validate_args=False), 1, validate_args=False)


def test_batches_that_are_not_a_number_are_skipped_then_training_is_given_up():
    solution = Stochastic(steps=400, learning_rate=5e-2).solve(Target(samples=rows(400) + 3), Module(Breaks()), 0)
    assert not solution.best.converged
    assert any("skipped (its log density was NaN)" in note for note in solution.notes)
    assert math.isfinite(solution.best.loss) and bool((solution.best.model.module.loc <= 0.5).all())
    with pytest.raises(InputError, match="Cannot train `Module\\(Breaks\\)`: its log density was NaN"):
        SHORT.solve(Target(samples=rows(400)), Module(Breaks(start=1.0)), 0)


def test_the_default_rate_reaches_weights_far_away_and_suits_a_flow():
    far = Stochastic(steps=1_000).solve(Target(samples=rows(1_000) + 20), Module(Bell()), 0).best
    assert torch.allclose(far.model.mean, torch.full((2,), 20.0, dtype=torch.float64), atol=0.3)
    flow = Stochastic(steps=300).solve(Target(samples=rows(1_000) * 1e-4 + 7), Flow(transforms=1, hidden=(16,)), 0).best
    exact = math.log(2 * math.pi * math.e) + 2 * math.log(1e-4)
    assert flow.loss == pytest.approx(exact, abs=0.1)


def test_it_tells_how_far_it_is_and_is_chosen_last():
    said = []
    SHORT.solve(Target(samples=rows(200)), Module(Bell()), 0, Work(tell=lambda text, done: said.append((text, done))))
    assert any("loss" in text and 0 < done < 1 for text, done in said)
    access = Target(samples=rows(50)).access
    assert solver_for(ForwardKL(), Flow(), access).name == "stochastic"
    assert solver_for(ForwardKL(), Gaussian(), access).name == "closed_form"


@pytest.mark.parametrize(
    "fields", [{"steps": 0}, {"epochs": 1.5}, {"batch": -1}, {"learning_rate": 0}, {"clip": math.nan}, {"weight_decay": -1}]
)
def test_bad_fields_are_refused(fields):
    with pytest.raises(InputError, match="Cannot use `Stochastic`"):
        Stochastic(**fields)


RUN = """
import sys, time
import torch
sys.path.insert(0, {here!r})
from test_stochastic import *
torch.set_num_threads(1)
folder, slow = sys.argv[1], float(sys.argv[2])
x = rows(400)
work = Work(tell=lambda text, done: time.sleep(slow), journal=Journal.of(folder, {{"fit": 1}}))
family = Flow(transforms=1, hidden=(8,))
solution = Stochastic(steps=500, learning_rate=5e-3).solve(Target(samples=x), family, 0, work, stride=5)
Journal.of(folder, {{"answer": 1}}).save("answer", family.parameters(solution.best.model), {{"loss": solution.best.loss}})
"""


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    code = RUN.format(here=str(Path(__file__).parent))
    quiet = {"OMP_NUM_THREADS": "1"}

    def command(folder, slow):
        return "-c", code, tmp_path / folder, slow

    assert run(*command("whole", 0), env=quiet).returncode == 0
    running = Program(*command("killed", 0.1), env=quiet)
    journal, deadline = Journal.of(tmp_path / "killed", {"fit": 1}), time.monotonic() + 60
    while time.monotonic() < deadline:
        found = journal.load("training", _both)
        if found is not None and int(found[1]["round"]) >= 3:
            break
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    assert running.wait() == -signal.SIGKILL
    part = journal.load("training", _both)
    assert part is not None and 3 <= int(part[1]["round"]) < 12
    assert Journal.of(tmp_path / "killed", {"answer": 1}).load("answer", _both) is None
    assert run(*command("killed", 0), env=quiet).returncode == 0
    whole, killed = (Journal.of(tmp_path / name, {"answer": 1}).load("answer", _both) for name in ("whole", "killed"))
    assert same(whole[0], killed[0]) and whole[1] == killed[1]
    rounds = [Journal.of(tmp_path / name, {"fit": 1}).load("training", _both)[1]["round"] for name in ("whole", "killed")]
    assert rounds[0] == rounds[1] > 3


def test_a_stream_of_pairs_is_fitted_too():
    x = rows(2_000)
    y = 20 * x[:, :1] + 10 + rows(2_000, 1)[:, :1]
    blocks = [Block(b, torch.ones(len(b), dtype=torch.float64), a) for a, b in zip(x.split(500), y.split(500), strict=True)]
    stream = Pieces(blocks)
    stream.names = ("y",)
    family = MixtureDensityNetwork(1, (16,))
    solution = Stochastic(steps=600, learning_rate=1e-2).solve(Target(samples=stream), family, 0, stride=5)
    law = solution.best.model(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    assert law.event_shape == (1,) and torch.allclose(law.mean[:, 0], torch.tensor([10.0, 30.0], dtype=torch.float64), atol=1.5)
    assert solution.held.block.context.shape[1] == 2

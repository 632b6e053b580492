"""Heads and loss in chunks: the same as the plain route in value and gradient, and nothing done twice, or for nothing."""

import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from whichkl import losses as wl
from whichkl._checks import InputError

PARAMETERS = {"jeffreys": {"weight_on_forward": 0.3}, "jensen_shannon": {"weight": 0.2}, "renyi": {"order": 2.0}}
N, V, H, G = 11, 13, 4, 5


def setting(dtype=torch.float64, rows=N, vocabulary=V, seed=0, **changed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    student = {"hidden_student": draw(rows, H), "weight_student": draw(vocabulary, H), "bias_student": draw(vocabulary)}
    teacher = {"hidden_teacher": draw(rows, G), "weight_teacher": draw(vocabulary, G), "bias_teacher": draw(vocabulary)}
    leaves = {name: one.requires_grad_() for name, one in student.items()}
    return leaves | teacher | changed


def plain(
    hidden_student, weight_student, bias_student, hidden_teacher, weight_teacher, bias_teacher, divergence="forward_kl", **rest
):
    logits = {}
    for who, hidden, weight, bias in (
        ("student", hidden_student, weight_student, bias_student),
        ("teacher", hidden_teacher, weight_teacher, bias_teacher),
    ):
        z = hidden @ weight.T + (0 if bias is None else bias)
        z = z * rest.pop(f"logit_scale_{who}", 1.0)
        cap = rest.pop(f"softcap_{who}", None)
        logits[who] = z if cap is None else cap * torch.tanh(z / cap)
    rest.pop("chunk_size", None)
    return wl.DIVERGENCES[divergence].function(**logits, **rest)


def with_gradients(function, arguments, weights=None):
    leaves = [one for one in arguments.values() if isinstance(one, torch.Tensor) and one.requires_grad]
    for leaf in leaves:
        leaf.grad = None
    loss = function(**arguments)
    (loss if weights is None else (loss * weights).sum()).backward()
    return [loss.detach(), *(leaf.grad.clone() for leaf in leaves)]


def agree(arguments, atol=1e-12, weights=None):
    got, wanted = (with_gradients(f, arguments, weights) for f in (wl.linear_divergence, plain))
    assert len(got) > 1
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)


@pytest.mark.parametrize("name", list(wl.DIVERGENCES))
@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, 4, 5, 10, 11, 50])
def test_chunked_is_plain(name, chunk_size):
    agree(setting(divergence=name, chunk_size=chunk_size, temperature=1.7, temperature_squared=True, **PARAMETERS.get(name, {})))


MASKS = {
    "none": torch.zeros(N, dtype=torch.bool),
    "one": torch.arange(N) == 4,
    "some": torch.arange(N) % 3 != 0,
    "all": torch.ones(N, dtype=torch.bool),
}


@pytest.mark.parametrize("name", list(wl.DIVERGENCES))
@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_masks_and_reductions(name, mask, reduction):
    arguments = setting(divergence=name, mask=MASKS[mask], reduction=reduction, chunk_size=3)
    with torch.no_grad():
        arguments["hidden_teacher"][~MASKS[mask]] = math.nan
        arguments["hidden_student"][~MASKS[mask]] = math.inf
    weights = torch.linspace(-1, 2, N, dtype=torch.float64) if reduction == "none" else None
    got = with_gradients(wl.linear_divergence, arguments, weights)
    with torch.no_grad():  # a matrix product spreads NaN to the weight's gradient: the plain route can't have it
        arguments["hidden_teacher"][~MASKS[mask]] = 1.0
        arguments["hidden_student"][~MASKS[mask]] = 1.0
    for one, other in zip(got, with_gradients(plain, arguments, weights), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", list(wl.DIVERGENCES))
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_soft_caps_scales_and_padding(name, chunk_size):
    wide = setting(vocabulary=V + 3, divergence=name, chunk_size=chunk_size, vocabulary_=0)
    wide.pop("vocabulary_")
    wide["weight_teacher"], wide["bias_teacher"] = wide["weight_teacher"][:V], wide["bias_teacher"][:V]
    caps = {"softcap_student": 2.0, "logit_scale_student": 0.7, "softcap_teacher": 3.0, "logit_scale_teacher": 1.3}
    agree(wide | caps | {"vocabulary": V - 1, "temperature": 0.8})
    agree(wide | {"logit_scale_student": 0.5, "bias_student": None, "bias_teacher": None, "vocabulary": V})


@pytest.mark.parametrize("name", list(wl.DIVERGENCES))
def test_impossible_tokens_come_through_biases(name):
    arguments = setting(divergence=name, chunk_size=4, reduction="sum")
    with torch.no_grad():
        arguments["bias_teacher"][2] = arguments["bias_student"][2] = -math.inf
    agree(arguments)
    if not wl.DIVERGENCES[name].divergence.bounded and name != "interpolated_kl":
        with torch.no_grad():
            arguments["bias_teacher"][3] = arguments["bias_student"][5] = -math.inf
        agree(arguments)


@pytest.mark.parametrize(
    "frozen", [("weight_student", "bias_student"), ("hidden_student",), ("weight_student",), ("bias_student",)]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_parts_get_no_gradient(frozen, reduction):
    arguments = setting(reduction=reduction, chunk_size=4, divergence="reverse_kl")
    for name in frozen:
        arguments[name].requires_grad_(False)
    weights = torch.linspace(0.5, 2, N, dtype=torch.float64) if reduction == "none" else None
    agree(arguments, weights=weights)
    assert all(arguments[name].grad is None for name in frozen)


def test_a_second_backward_pass_and_scaled_losses():
    arguments = setting(chunk_size=4)
    loss = wl.linear_divergence(**arguments)
    (3 * loss).backward(retain_graph=True)
    first = arguments["weight_student"].grad.clone()
    loss.backward()
    torch.testing.assert_close(arguments["weight_student"].grad, first * 4 / 3, atol=1e-12, rtol=0)
    got = with_gradients(lambda **a: (3 * wl.linear_divergence(**a)).square(), arguments)
    wanted = with_gradients(lambda **a: (3 * plain(**a)).square(), arguments)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_gradcheck():
    arguments = setting(rows=3, vocabulary=5)
    names = ["hidden_student", "weight_student", "bias_student"]
    for name in ("forward_kl", "reverse_kl", "jensen_shannon", "renyi"):
        rest = {key: one for key, one in arguments.items() if key not in names}
        assert torch.autograd.gradcheck(
            lambda *leaves, rest=rest, name=name: wl.linear_divergence(
                **dict(zip(names, leaves, strict=True)), **rest, divergence=name, chunk_size=2, softcap_student=3.0
            ),
            [arguments[key] for key in names],
        )


class Products(TorchDispatchMode):
    """Counts matrix products, in rows of hidden states, and looks at the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.rows, self.largest = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = [x for x in args if isinstance(x, torch.Tensor)][-2:]
            kind = "weight" if a.shape[0] == V else "hidden" if a.shape[1] == V else "student" if a.shape[1] == H else "teacher"
            self.rows[kind] += b.shape[0] if kind == "weight" else a.shape[0]
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel() if V in out.shape else 0)
        return out


def products(arguments, backward=True, grad=True):
    with Products() as seen, torch.set_grad_enabled(grad):
        loss = wl.linear_divergence(**arguments)
        if backward:
            loss.sum().backward()
    assert seen.largest <= 3 * V or seen.largest == V * max(H, G)
    return dict(seen.rows)


def test_no_product_is_done_twice_or_for_nothing():
    arguments = setting(chunk_size=3)
    assert products(arguments) == {"student": N, "teacher": N, "hidden": N, "weight": N}
    assert products(arguments, backward=False, grad=False) == {"student": N, "teacher": N}
    mask = MASKS["some"]
    count = int(mask.sum())
    assert products(arguments | {"mask": mask}) == dict.fromkeys(["student", "teacher", "hidden", "weight"], count)
    assert products(arguments | {"mask": MASKS["none"]}) == {}
    frozen = {name: arguments[name].detach() for name in ("weight_student", "bias_student")}
    assert products(arguments | frozen) == {"student": N, "teacher": N, "hidden": N}
    assert products(arguments | frozen | {"reduction": "none"}) == {"student": N, "teacher": N, "hidden": N}
    nothing = frozen | {"hidden_student": arguments["hidden_student"].detach()}
    assert products(arguments | nothing, backward=False) == {"student": N, "teacher": N}
    teacher = {name: arguments[name].clone().requires_grad_() for name in ("hidden_teacher", "weight_teacher")}
    assert products(arguments | teacher) == {"student": N, "teacher": N, "hidden": N, "weight": N}
    assert teacher["weight_teacher"].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_dtypes_are_summed_in_float32(dtype):
    """Also at a small divergence, where logits rounded to the dtype would be useless."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(20, 64, generator=generator).to(dtype)
    weight = (0.3 * torch.randn(700, 64, generator=generator)).to(dtype)
    near = (weight + 0.01 * torch.randn(700, 64, generator=generator).to(dtype)).to(dtype)
    arguments = {"hidden_student": hidden.requires_grad_(), "weight_student": near.requires_grad_(), "bias_student": None}
    arguments |= {"hidden_teacher": hidden.detach(), "weight_teacher": weight, "bias_teacher": None}
    got = with_gradients(lambda **a: wl.linear_divergence(**a, chunk_size=7), arguments)
    exact = {
        key: one if one is None else one.detach().double().requires_grad_(one.requires_grad) for key, one in arguments.items()
    }
    wanted = with_gradients(plain, exact)
    assert got[0].dtype == torch.float32
    assert wanted[0] < 0.01
    assert abs(got[0] - wanted[0]) < 1e-4 * wanted[0]
    for one, other in zip(got[1:], wanted[1:], strict=True):
        assert one.dtype == dtype
        assert (one - other).norm() < 2 * torch.finfo(dtype).eps * other.norm() + 5e-5 * other.norm()


def test_wide_weights_and_narrow_hidden_states_as_under_autocast():
    arguments = setting(torch.float32)
    wanted = with_gradients(wl.linear_divergence, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = with_gradients(wl.linear_divergence, arguments)
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other)
    mixed = arguments | {"hidden_student": arguments["hidden_student"].detach().bfloat16().requires_grad_()}
    got = with_gradients(wl.linear_divergence, mixed)
    assert [one.dtype for one in got] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]


def test_tiles_of_narrow_weights(monkeypatch):
    monkeypatch.setattr("whichkl.distillation.losses.heads._NUMBERS_PER_TILE", 5 * H)
    arguments = setting(torch.float32, chunk_size=4)
    narrow = {
        key: one.detach().bfloat16().requires_grad_(one.requires_grad) for key, one in arguments.items() if key != "chunk_size"
    }
    wide = {key: one.detach().double().requires_grad_(one.requires_grad) for key, one in narrow.items()}
    got, wanted = with_gradients(wl.linear_divergence, narrow | {"chunk_size": 4}), with_gradients(plain, wide)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=2e-2, atol=2e-3)


def test_shapes_of_batches_and_no_rows():
    arguments = setting(rows=12)
    flat = wl.linear_divergence(**arguments, reduction="none")
    shaped = arguments | {key: arguments[key].view(3, 4, -1) for key in ("hidden_student", "hidden_teacher")}
    torch.testing.assert_close(wl.linear_divergence(**shaped, reduction="none"), flat.view(3, 4))
    single = arguments | {key: arguments[key][0] for key in ("hidden_student", "hidden_teacher")}
    torch.testing.assert_close(wl.linear_divergence(**single, mask=torch.tensor(True)), flat[0])
    nothing = arguments | {key: arguments[key][:0] for key in ("hidden_student", "hidden_teacher")}
    loss = wl.linear_divergence(**nothing)
    loss.backward()
    assert loss.item() == 0
    assert (arguments["weight_student"].grad == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_into_one_graph(reduction, compiling):
    arguments = setting(reduction=reduction, divergence="jensen_shannon", mask=MASKS["some"], softcap_student=4.0)
    weights = torch.linspace(-1, 2, N, dtype=torch.float64) if reduction == "none" else None

    def loss(**given):
        return 2 * wl.linear_divergence(**given)

    graphs = []

    def backend(graph, example):
        graphs.append(graph)
        return graph

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    got, wanted = with_gradients(compiled, arguments, weights), with_gradients(loss, arguments, weights)
    assert len(graphs) == 1
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_the_compiled_node_keeps_torchs_contract():
    from whichkl.distillation.losses.linear import _op

    a = setting(rows=3, vocabulary=4)
    tensors = (
        a["hidden_student"],
        a["weight_student"],
        a["bias_student"],
        a["hidden_teacher"],
        a["weight_teacher"],
        a["bias_teacher"],
    )
    rest = ([True, True, True], "forward_kl", [], 4, 1.0, 2, [1.0, 1.0], [0.0, 0.0])
    for scale in (torch.tensor(0.5, dtype=torch.float64), None):
        found = torch.library.opcheck(_op, (*tensors, None, scale, None, *rest))
        assert found and set(found.values()) == {"SUCCESS"}


BAD = [
    ({"weight_student": torch.zeros(V, H + 1)}, "student has hidden states"),
    ({"bias_teacher": torch.zeros(V + 1)}, "teacher has hidden states"),
    ({"hidden_teacher": torch.zeros(N + 1, G)}, "the same rows"),
    ({"weight_teacher": torch.zeros(V + 1, G), "bias_teacher": None}, "vocabulary="),
    ({"vocabulary": V + 1}, "1 ≤ vocabulary"),
    ({"chunk_size": 0}, "at least one row"),
    ({"mask": torch.ones(N)}, "torch.bool"),
    ({"temperature": -1.0}, "positive"),
    ({"softcap_student": 0.0}, "soft cap is positive"),
    ({"reduction": "batchmean"}, "mean goes over rows"),
    ({"divergence": "kl"}, "there is no such divergence"),
    ({"order": 2.0}, "no parameters"),
    ({"hidden_student": torch.zeros(N, H, dtype=torch.long)}, "floating point"),
]


@pytest.mark.parametrize(("wrong", "match"), BAD)
def test_bad_input_is_refused(wrong, match):
    with pytest.raises(InputError, match=match):
        wl.linear_divergence(**(setting(torch.float32) | wrong))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cuda_device_gives_the_same(dtype):
    arguments = setting(torch.float32, chunk_size=4)
    there = {
        key: one.detach().to("cuda", dtype).requires_grad_(one.requires_grad) if isinstance(one, torch.Tensor) else one
        for key, one in arguments.items()
    }
    here = {
        key: one.detach().cpu().double().requires_grad_(one.requires_grad) if isinstance(one, torch.Tensor) else one
        for key, one in there.items()
    }
    for one, other in zip(with_gradients(wl.linear_divergence, there), with_gradients(plain, here), strict=True):
        torch.testing.assert_close(one.cpu().double(), other, rtol=10 * torch.finfo(dtype).eps, atol=10 * torch.finfo(dtype).eps)


def test_one_column_a_learnt_temperature_and_transforms_are_refused():
    h, w = torch.randn(3, 2), torch.randn(4, 2)
    heads = {"hidden_student": h, "weight_student": w, "hidden_teacher": h, "weight_teacher": w}
    with pytest.raises(InputError, match="one column.*torch.cat"):
        wl.linear_divergence(**heads | {"weight_student": w[:1], "weight_teacher": w[:1]})
    with pytest.raises(InputError, match="Cannot learn this temperature"):
        wl.linear_divergence(**heads, temperature=torch.tensor(2.0, requires_grad=True))
    one = wl.linear_divergence(**heads | {"weight_teacher": 2 * w}, temperature=torch.tensor(2.0))
    assert torch.equal(one, wl.linear_divergence(**heads | {"weight_teacher": 2 * w}, temperature=2.0))
    for transform in (torch.func.vmap, torch.func.grad):
        with pytest.raises(InputError, match="inside a transform of torch.func.*all rows at once"):
            transform(lambda x: wl.linear_divergence(**heads | {"hidden_student": x, "hidden_teacher": x}))(h[None])


# ---- stored rows in place of the teacher's head


def stored_ways(seed=3):
    """Stored rows of a teacher's logits."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(N, V, generator=generator, dtype=torch.float64)
    log_p = logits.log_softmax(-1)
    kept = wl.TopK.of(logits, 4)
    ragged = kept.indices.clone()
    ragged[::2, 2:] = -1
    tokens = torch.multinomial(log_p.exp(), 30, replacement=True, generator=generator)
    impossible = log_p.masked_fill(torch.arange(V) > 2, -math.inf).log_softmax(-1)
    return {
        "top k": kept,
        "all": wl.TopK.of(logits, V),
        "without the rest": wl.TopK(kept.log_probs, kept.indices),
        "ragged": wl.TopK(kept.log_probs, ragged),
        "impossible": wl.TopK.of(impossible, 5),
        "drawn": wl.SampledTokens(tokens, log_p.gather(1, tokens)),
        "proposed": wl.SampledTokens(tokens, log_p.gather(1, tokens), log_proposal=log_p.gather(1, tokens) - 0.1),
    }


def of_stored(hidden_student, weight_student, bias_student, teacher, divergence, softcap_student=None, chunk_size=None, **rest):
    z = hidden_student @ weight_student.T + bias_student
    z = z if softcap_student is None else softcap_student * torch.tanh(z / softcap_student)
    return wl.DIVERGENCES[divergence].function(teacher=teacher, student=z, **rest)


WAYS = list(stored_ways())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("divergence", wl.DIVERGENCES)
def test_stored_rows_take_the_place_of_the_teachers_head(divergence, way):
    stored, entry = stored_ways()[way], wl.DIVERGENCES[divergence].divergence
    leaves = {name: one for name, one in setting().items() if name.endswith("student")}
    if not (entry.coarsens if isinstance(stored, wl.TopK) else entry.sums):
        with pytest.raises(InputError):
            wl.linear_divergence(**leaves, teacher=stored, divergence=divergence)
        return
    mask = torch.arange(N) % 3 != 1
    for extra in ({"reduction": "sum"}, {"mask": mask, "chunk_size": 2}, {"softcap_student": 1.5, "chunk_size": 3}):
        arguments = {**leaves, "teacher": stored, "divergence": divergence, **extra}
        got, wanted = (with_gradients(f, arguments) for f in (wl.linear_divergence, of_stored))
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
    weights = torch.linspace(-1, 2, N, dtype=torch.float64)
    arguments = {**leaves, "teacher": stored, "divergence": divergence, "reduction": "none"}
    got, wanted = (with_gradients(f, arguments, weights) for f in (wl.linear_divergence, of_stored))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(wl.linear_divergence(**arguments), wanted[0])


def test_stored_rows_of_several_axes_and_of_another_temperature():
    stored = wl.TopK.of(torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0)), 4, temperature=2.0)
    leaves = {name: one for name, one in setting(torch.float32, rows=6).items() if name.endswith("student")}
    leaves["hidden_student"] = leaves["hidden_student"].detach().view(2, 3, H)
    given = {"teacher": stored, "divergence": "forward_kl", "temperature": 2.0, "reduction": "none", "temperature_squared": True}
    torch.testing.assert_close(wl.linear_divergence(**leaves, **given), of_stored(**leaves, **given))
    for changed, message in (
        ({"temperature": 1.0}, "at temperature 1"),
        ({"vocabulary": 2}, "and the student has 2"),
        ({"teacher": wl.TopK(stored.log_probs[0], stored.indices[0], 2.0)}, "the same rows of teacher and student"),
        ({"teacher": None}, "Pass `hidden_teacher=` and `weight_teacher=`, or `teacher=` alone"),
        ({"teacher": torch.zeros(2, 3, V)}, "or `teacher=` alone"),
        ({"hidden_teacher": leaves["hidden_student"]}, "or `teacher=` alone"),
    ):
        with pytest.raises(InputError, match=message):
            wl.linear_divergence(**leaves, **{**given, **changed})

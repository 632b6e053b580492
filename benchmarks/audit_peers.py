"""The audit of the field: distillation losses of a dozen libraries, each called on the CPU as its own trainer calls it.

Losses of TRL, Liger and torchtune are those that are installed (of torchtune only its file of losses is loaded, which needs torch
alone). The others can't be installed without a GPU or a cluster: `WRITTEN` has what their documentation and source describe, in
this file's own words, with the date and place that were read. Estimates from drawn tokens are taken in expectation over all
tokens, so that what they train towards shows.

`python benchmarks/audit_peers.py` prints a Markdown table and, for each loss that doesn't pass, what is wrong; `--full` prints
every check. Exit code 0: every loss could be called.
"""

import importlib
import importlib.metadata
import importlib.util
import math
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from whichkl.distillation.audit import audit


def trl_generalised():
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    return GKDTrainer.generalized_jsd_loss


def trl_chunked():
    return importlib.import_module("trl.trainer.distillation_trainer")._chunked_divergence_loss


def hidden(loss, *, teacher, student, mask, beta=0.5):
    eye = torch.eye(student.shape[-1], dtype=student.dtype)
    return loss(student, teacher, eye, eye, mask, beta)[0]


def liger(**settings):
    return importlib.import_module("liger_kernel.chunked_loss").LigerFusedLinearJSDLoss(compiled=False, **settings)


def torchtune(name):
    found = importlib.util.find_spec("torchtune")
    if found is None:
        raise ModuleNotFoundError("torchtune")
    path = Path(found.submodule_search_locations[0]) / "modules/loss/kd_losses.py"
    spec = importlib.util.spec_from_file_location("kd_losses", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)()


def logs(*logits):
    return [x.float().log_softmax(-1) if x.dtype != torch.float64 else x.log_softmax(-1) for x in logits]


def kl(log_a, log_b):
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def over_labels(rows, labels):
    counts = (labels != -100).to(rows.dtype)
    return (rows * counts).sum() / counts.sum()


def verl_forward_top_k(student, teacher, mask=None, k=64):
    """The teacher's k likeliest tokens, neither side renormalised, no bucket for the rest; one number per token."""
    log_p, log_q = logs(teacher.detach(), student)
    top = log_p.topk(k, -1)
    return (top.values.exp() * (top.values - log_q.gather(-1, top.indices))).sum(-1) * (1 if mask is None else mask)


def nemo_top_k(student, teacher, mask=None, k=64, direction="forward"):
    """Both sides renormalised on the teacher's k likeliest tokens (`zero_outside_topk: false`)."""
    top = teacher.detach().topk(k, -1)
    log_p, log_q = logs(top.values, student.gather(-1, top.indices))
    rows = kl(log_p, log_q) if direction == "forward" else kl(log_q, log_p)
    return rows.mean() if mask is None else (rows * mask).sum() / mask.sum().clamp(min=1)


def swift_generalised(student_logits, teacher_logits, labels, beta=0.5, temperature=1.0, chunk_size=512):
    """Tokens that count, chunk by chunk: KLs to the mixture β p + (1 − β) q, in the dtype of the logits."""
    counts = labels != -100
    student, teacher = student_logits[counts] / temperature, teacher_logits[counts] / temperature
    if not len(student):
        return student_logits.new_zeros(())
    total = 0.0
    for s, t in zip(student.split(chunk_size), teacher.split(chunk_size), strict=True):
        log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
        if beta in (0, 1):
            total = total + (kl(log_q, log_p) if beta else kl(log_p, log_q)).sum()
            continue
        log_m = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
        total = total + (beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)).sum()
    return total / counts.sum()


def distillkit_dense(student, teacher, mask=None, temperature=1.0):
    """KL per token in float32, times T², over the tokens that count."""
    rows = kl(*logs(teacher / temperature, student / temperature))
    total = rows.sum() if mask is None else (rows * mask).sum()
    return total * temperature**2 / (rows.numel() if mask is None else mask.sum())


def distillkit_sparse(student, teacher, mask=None, k=64, tail=False):
    """The teacher's k likeliest tokens, renormalised, against the student's full row; or one bucket more for the rest of both."""
    log_p, log_q = logs(teacher.detach(), student)
    top = log_p.topk(k, -1)
    log_p, log_q = top.values, log_q.gather(-1, top.indices)
    if tail:
        log_p, log_q = (
            torch.cat([x, torch.log(-torch.expm1(x.logsumexp(-1, keepdim=True).clamp(max=-1e-6)))], -1) for x in (log_p, log_q)
        )
    else:
        log_p = log_p.log_softmax(-1)
    rows = kl(log_p, log_q)
    return rows.mean() if mask is None else (rows * mask).sum() / mask.sum()


def distillm(student, teacher, labels, kind="forward", lam=0.1):
    """Products of probabilities and logarithms, those at infinite logits zeroed; the mixture is made of probabilities."""
    log_p, log_q = logs(teacher, student)
    p, q, infinite = log_p.exp(), log_q.exp(), teacher.isinf() | student.isinf()

    def product(a, b):
        return (a * b).masked_fill(infinite, 0).sum(-1)

    if kind == "forward":
        rows = -product(p, log_q)
    elif kind == "reverse":
        rows = product(q, log_q) - product(q, log_p)
    elif kind == "js":
        log_m = ((1 - lam) * p + lam * q).log()
        rows = lam * (product(q, log_q) - product(q, log_m)) + (1 - lam) * (product(p, log_p) - product(p, log_m))
    elif kind == "skewed forward":
        rows = -product(p, (lam * p + (1 - lam) * q).log())
    elif kind == "skewed reverse":
        rows = product(q, log_q) - product(q, ((1 - lam) * p + lam * q).log())
    else:
        rows = (p - q).abs().masked_fill(infinite, 0).sum(-1) / 2
    return over_labels(rows, labels)


def modelopt_logits(logits_s, logits_t, temperature=1.0, reduction="mean"):
    """F.kl_div on rows, the teacher detached, times T²; the default reduction is the mean over all numbers."""
    log_q, p = (logits_s / temperature).log_softmax(-1).flatten(0, -2), (logits_t / temperature).softmax(-1).flatten(0, -2)
    return F.kl_div(log_q, p.detach(), reduction=reduction) * temperature**2


def estimate_as_a_loss(student, teacher, mask=None, kind="k3"):
    """An estimate of KL(student‖teacher) on tokens drawn, backpropagated: its mean over the student's tokens, the draw fixed."""
    log_p, log_q = logs(teacher.detach(), student)
    r = log_q - log_p
    terms = {"k1": r, "k2": r.square() / 2, "k3": r + torch.expm1(-r)}[kind]
    rows = (log_q.exp().detach() * terms).sum(-1)
    return rows.mean() if mask is None else (rows * mask).sum() / mask.sum().clamp(min=1)


def axolotl_top_k(student, teacher, mask=None, k=64):
    """The teacher's k likeliest tokens, renormalised, against the student's full row; divided by the entries that count."""
    log_p, log_q = logs(teacher.detach(), student)
    top = log_p.topk(k, -1)
    terms = top.values.log_softmax(-1).exp() * (top.values.log_softmax(-1) - log_q.gather(-1, top.indices))
    return terms.mean() if mask is None else terms[mask].mean()


def openrlhf_kd(student, teacher, label):
    """MiniLLM's form: the cross-entropy with the teacher's rows, infinite logits zeroed."""
    log_p, log_q = logs(teacher, student)
    return over_labels(-(log_p.exp() * log_q).masked_fill(student.isinf(), 0).sum(-1), label)


INSTALLED = {
    "TRL, GKD's `generalized_jsd_loss`": (trl_generalised, {"adapter": "named_labels", "knobs": {"beta": (0, 1)}}),
    "TRL, `_chunked_divergence_loss`": (trl_chunked, {"adapter": hidden, "knobs": {"beta": (0, 1)}}),
    "Liger, `LigerFusedLinearJSDLoss`": (liger, {"adapter": "heads"}),
    "Liger, the same, no hard loss": (
        lambda: liger(weight_hard_loss=0.0, weight_soft_loss=1.0),
        {"adapter": "heads", "knobs": {"beta": (0, 1)}},
    ),
    "torchtune, `ForwardKLLoss`": (lambda: torchtune("ForwardKLLoss"), {"adapter": "labels", "claims": "forward_kl"}),
    "torchtune, `ReverseKLLoss`": (lambda: torchtune("ReverseKLLoss"), {"adapter": "labels", "claims": "reverse_kl"}),
    "torchtune, `SymmetricKLLoss`": (lambda: torchtune("SymmetricKLLoss"), {"adapter": "labels", "claims": "jeffreys"}),
    "torchtune, `ForwardKLWithChunkedOutputLoss`": (
        lambda: torchtune("ForwardKLWithChunkedOutputLoss"),
        {"adapter": "chunks", "claims": "forward_kl"},
    ),
    "torchtune, `ReverseKLWithChunkedOutputLoss`": (
        lambda: torchtune("ReverseKLWithChunkedOutputLoss"),
        {"adapter": "chunks", "claims": "reverse_kl"},
    ),
}
"""A function that imports the loss, and the options of its audit."""
LABELS = {"adapter": "labels"}
WRITTEN = {
    "verl, `forward_kl_topk`, k = 64": (verl_forward_top_k, {"claims": "forward_kl"}),
    "NeMo-RL, forward, top-64": (nemo_top_k, {"claims": "forward_kl"}),
    "NeMo-RL, reverse, top-64": (partial(nemo_top_k, direction="reverse"), {"claims": "reverse_kl"}),
    "ms-swift, GKD's `generalized_jsd_loss`": (swift_generalised, {"knobs": {"beta": (0, 1)}}),
    "DistillKit, `kl`, dense": (partial(distillkit_dense, temperature=2.0), {"claims": "forward_kl"}),
    "DistillKit, `kl`, top-64, missing zero": (distillkit_sparse, {"claims": "forward_kl"}),
    "DistillKit, `kl`, top-64, a bucket": (partial(distillkit_sparse, tail=True), {}),
    "DistiLLM, `forward_kl`": (distillm, {**LABELS, "claims": "forward_kl"}),
    "DistiLLM, `reverse_kl`": (partial(distillm, kind="reverse"), {**LABELS, "claims": "reverse_kl"}),
    "DistiLLM, `js_distance`": (partial(distillm, kind="js", lam=0.9), {**LABELS, "claims": "jensen_shannon"}),
    "DistiLLM, `skewed_forward_kl`": (partial(distillm, kind="skewed forward"), {**LABELS, "claims": "skew_forward_kl"}),
    "DistiLLM, `skewed_reverse_kl`": (partial(distillm, kind="skewed reverse"), {**LABELS, "claims": "skew_reverse_kl"}),
    "DistiLLM, `tv_distance`": (partial(distillm, kind="tv"), {**LABELS, "claims": "total_variation"}),
    "ModelOpt, `LogitsDistillationLoss`": (modelopt_logits, {"claims": "forward_kl"}),
    "ModelOpt, the same, batchmean": (partial(modelopt_logits, temperature=2.0, reduction="batchmean"), {"claims": "forward_kl"}),
    "slime, `low_var_kl` as a loss": (estimate_as_a_loss, {"claims": "reverse_kl"}),
    "OpenRLHF, k2 as a loss": (partial(estimate_as_a_loss, kind="k2"), {"claims": "reverse_kl"}),
    "OpenRLHF, k1 as a loss": (partial(estimate_as_a_loss, kind="k1"), {"claims": "reverse_kl"}),
    "OpenRLHF, `KDLoss`": (openrlhf_kd, {**LABELS, "claims": "forward_kl"}),
    "axolotl, top-64 `forward_kl`": (axolotl_top_k, {"claims": "forward_kl"}),
}
"""A loss written out, and the options of its audit."""


def versions():
    found = {}
    for name in ("trl", "liger-kernel", "torchtune", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return ", ".join(f"{name} {version}" for name, version in found.items())


def main():
    torch.set_num_threads(1)
    print(f"{versions()}\n\n| loss | passed | it is | wrong | fragile |\n|---|---|---|---|---|")
    failures = []
    for name, (load, options) in (INSTALLED | WRITTEN).items():
        try:
            loss = load() if name in INSTALLED else load
        except ImportError as error:
            print(f"| {name} | not installed: {error} | | | |")
            continue
        result = audit(loss, **options)
        wrong, fragile = (", ".join(sorted(names)) or "–" for names in (result.wrong, result.fragile))
        print(f"| {name} | {'yes' if result.passed else 'no'} | {result.identified} | {wrong} | {fragile} |", flush=True)
        failures += [f"- {name}: {one.finding}: {one.seen}" for one in result.checks if one.grade == "wrong"]
        if "--full" in sys.argv:
            print(result, file=sys.stderr)
    print("\n" + "\n".join(failures))


if __name__ == "__main__":
    main()

"""Head and loss of a distillation, forward and backward: whichkl in chunks, the plain route, the bare products, TRL's chunks.

The floor is the four products that nobody can leave out: logits of teacher and student, and the gradients by the student's
hidden states and weight. Every run has a process of its own: its peak is the most memory that it held, less what it held
before and less the gradients themselves. Rounds are interleaved, and medians are taken.
`python benchmarks/linear_divergence.py 1024 128256 1024 1` takes tokens, vocabulary, width and rounds. TRL is run where it is
installed.
"""

import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from whichkl import losses as wl


def products(student, teacher):
    (h, w), (g, v) = student, teacher
    with torch.no_grad():
        z = torch.mm(h, w.T)
        torch.mm(g, v.T)
        h.grad, w.grad = z @ w, z.T @ h


def plain(student, teacher, divergence="forward_kl"):
    with torch.no_grad():
        logits = teacher[0] @ teacher[1].T
    wl.DIVERGENCES[divergence].function(teacher=logits, student=student[0] @ student[1].T).backward()


def chunked(student, teacher, divergence="forward_kl"):
    (h, w), (g, v) = student, teacher
    wl.linear_divergence(hidden_student=h, weight_student=w, hidden_teacher=g, weight_teacher=v, divergence=divergence).backward()


def trl(student, teacher, beta=0.0):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    (h, w), (g, v) = student, teacher
    _chunked_divergence_loss(h[None], g[None], w, v, torch.ones(1, len(h)), beta)[0].backward()


WAYS = {
    "the four products": products,
    "whichkl": chunked,
    "plain": plain,
    "TRL": trl,
    "whichkl, reverse_kl": lambda *heads: chunked(*heads, "reverse_kl"),
    "whichkl, jensen_shannon": lambda *heads: chunked(*heads, "jensen_shannon"),
    "TRL, jensen_shannon": lambda *heads: trl(*heads, 0.5),
}


def held():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def one(way, n, vocabulary, width):
    """One run in this process, as a line of JSON."""
    torch.manual_seed(0)
    heads = [(torch.empty(n, width).normal_(), torch.empty(vocabulary, width).normal_(0, width**-0.5)) for _ in range(2)]
    for x in heads[0]:
        x.requires_grad_()
    small = [(h[:2].detach().requires_grad_(), w[:8].detach().requires_grad_()) for h, w in heads]
    WAYS[way](*small)  # imports
    before, wall, cpu = held(), time.perf_counter(), time.process_time()
    WAYS[way](*heads)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before - sum(4 * x.numel() for x in heads[0])
    print(json.dumps({"seconds": wall, "cpu_seconds": cpu, "peak_mb": peak / 2**20}))


def measured(way, *sizes):
    command = [sys.executable, __file__, "--one", way, *map(str, sizes)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main(n=256, vocabulary=32_000, width=512, rounds=5):
    ways = [way for way in WAYS if not way.startswith("TRL") or importlib.util.find_spec("trl")]
    runs = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            runs[way].append(measured(way, n, vocabulary, width))
    table = {way: {key: statistics.median(run[key] for run in all_runs) for key in all_runs[0]} for way, all_runs in runs.items()}
    table["whichkl, 4 × as many tokens"] = measured("whichkl", 4 * n, vocabulary, width)
    floor, least = table["the four products"], table["whichkl"]["peak_mb"]
    for way, row in table.items():
        times = f"{row['seconds']:7.2f} s {row['seconds'] / floor['seconds']:5.2f} ×  CPU {row['cpu_seconds']:7.2f} s"
        share = f"{row['cpu_seconds'] / floor['cpu_seconds']:5.2f} ×"
        print(f"{way:<28} {times} {share}  peak {row['peak_mb']:7,.0f} MiB  {row['peak_mb'] / least:6.1f} ×")
    sizes = {"tokens": n, "vocabulary": vocabulary, "width": width, "rounds": rounds, "threads": torch.get_num_threads()}
    print(json.dumps({"benchmark": "linear_divergence", **sizes, "ways": table}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        main(*map(int, sys.argv[1:]))

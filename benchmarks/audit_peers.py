"""Audits of other libraries' distillation losses, whichever are installed: TRL, Liger, torchtune's published losses.

Each is called on the CPU as its own trainer would call it. `python benchmarks/audit_peers.py` prints a Markdown table;
`--full` prints every check. Losses are found by import; of torchtune only the file of losses is loaded, which needs torch alone.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

import torch

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


PEERS = {
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


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("| loss | passed | it is | findings |\n|---|---|---|---|")
    for name, (load, options) in PEERS.items():
        try:
            loss = load()
        except ImportError as error:
            print(f"| {name} | not installed: {error} | | |")
            continue
        result = audit(loss, **options)
        print(
            f"| {name} | {'yes' if result.passed else 'no'} | {result.identified} | {', '.join(sorted(result.findings)) or '–'} |"
        )
        if "--full" in sys.argv:
            print(result, file=sys.stderr)

"""LanguageTrainer in two processes (DDP over gloo): the same weights as one process, and the same end on both."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch

from programs import LANGUAGE, Program

transformers = pytest.importorskip("transformers")
from accelerate.state import PartialState  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402

from test_language_trainer import arguments, causal, llama  # noqa: E402
from whichkl.distillation import LanguageTrainer  # noqa: E402
from whichkl.distillation.language.examples import together  # noqa: E402
from whichkl.distillation.language.rollouts import continued  # noqa: E402
from whichkl.distillation.language.token_loss import Side, TokenLoss  # noqa: E402
from whichkl.distillation.losses.rows import divergence_named  # noqa: E402

UNEQUAL = [{"prompt": [3 + k % 7, 4], "completion": [5 + k % 11] * (1 + (k * k) % 9)} for k in range(24)]


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(UNEQUAL)


def lora(seed):
    from test_language_adapters import adapted

    return adapted()


RUNS = {
    "data": {"objective": "reverse_kl", "hard_label_weight": 0.3},
    "accumulated": {"changes": {"gradient_accumulation_steps": 2, "max_steps": 1, "activation_checkpointing": True}},
    "budget": {"prefixes": {"student": 1.0}, "budget": 7e6, "changes": {"max_steps": 9}},
    "mixed": {"prefixes": {"student": 0.4, "teacher": 0.3, "data": 0.3}, "changes": {"gradient_accumulation_steps": 2}},
    "stream": {"train_dataset": Stream()},
    "adapter": {"student": lora},
    "own teacher": {"student": lora, "is_own_teacher": True, "hard_label_weight": 0.5},
    "drawn adapter": {"student": lora, "prefixes": {"student": 0.6, "data": 0.4}, "changes": {"gradient_accumulation_steps": 2}},
    "credit": {"objective": "reverse_kl", "credit": "sequence", "prefixes": {"student": 1.0}},
}


def run(folder, batch, names):
    """Train once per name; keep the weights, the draws of this process and what the trainer reports."""
    found = {}
    backend = {"ddp_backend": "gloo"} if "RANK" in os.environ else {}
    for name in names:
        given = dict(RUNS[name])
        changes = {"per_device_train_batch_size": batch, "optim": "sgd", "max_steps": 2, **backend, **given.pop("changes", {})}
        student = given.pop("student", llama)(1)
        teacher = student.get_base_model() if given.pop("is_own_teacher", False) else llama(0)
        trainer = LanguageTrainer(
            teacher=teacher, student=student, args=arguments(folder, **changes), max_new_tokens=8,
            **{"train_dataset": UNEQUAL, "eval_dataset": UNEQUAL[:13], **given},
        )  # fmt: skip
        before = trainer.evaluate()["eval_loss"]  # 13 examples for batches of 8, or twice 8: some fill up
        drawn, texts, collect = [], [], trainer.get_batch_samples

        def collected(*parts, collect=collect, drawn=drawn, texts=texts):
            batches, count = collect(*parts)
            texts += [one["input_ids"].tolist() for one in batches]
            drawn.append([int((one["end"] - one["begin"]).sum()) for one in batches] + [int(count)])
            return batches, count

        trainer.get_batch_samples = collected
        trainer.train()
        found[name] = {
            "before": before, "after": trainer.evaluate()["eval_loss"], "drawn": drawn, "texts": texts, "flops": trainer.flops,
            "tokens": trainer.tokens_generated, "steps": trainer.state.global_step,
            "losses": [one["loss"] for one in trainer.state.log_history if "loss" in one],
            "weights": [weight.detach().flatten().tolist() for weight in trainer.model.parameters()],
        }  # fmt: skip
    return found


def main(folder, *names):
    """Run as one of several processes, and write what was found."""
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(run(folder, 4, names)))


def in_two(folder, names, call="main"):
    """Run in two processes, and return what each found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"import sys; sys.path.insert(0, ''); import test_language_processes as here; here.{call}(*sys.argv[1:])"
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    here = {"cwd": Path(__file__).parent, "loads": LANGUAGE}
    programs = [
        Program("-c", code, folder, *names, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **here)
        for rank in range(2)
    ]
    for one in programs:
        assert one.wait(120) == 0, one.communicate()[1]
    return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]


def apart(one, other):
    return max(float((torch.tensor(a) - torch.tensor(b)).abs().max()) for a, b in zip(one, other, strict=True))


def check(folder, names):
    both, alone = in_two(folder, names), run(folder, 8, names)
    for name in names:
        first, second, single = both[0][name], both[1][name], alone[name]
        assert first["weights"] == second["weights"]
        for what in ("before", "after", "flops", "tokens", "steps", "losses"):
            assert first[what] == second[what]
        assert first["before"] == pytest.approx(single["before"], rel=1e-6)
        for mine, other in zip(first["drawn"], second["drawn"], strict=True):
            assert mine[-1] == other[-1] == sum(mine[:-1]) + sum(other[:-1])  # the loss is over the tokens of both
        if "prefixes" not in RUNS[name]:
            assert apart(first["weights"], single["weights"]) <= 1e-7
            assert first["flops"] == single["flops"] and first["losses"] == pytest.approx(single["losses"], rel=1e-6)
        else:
            assert first["texts"] != second["texts"]  # each draws under its own seed
            assert sum(first["tokens"].values()) > 0


def test_two_processes_train_as_one_and_stop_at_the_same_step(tmp_path):
    check(tmp_path, ["data", "budget"])


@pytest.mark.slow
def test_two_processes_agree_on_all_prefixes_with_accumulation_and_credit(tmp_path):
    check(tmp_path, ["accumulated", "mixed", "stream", "credit"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_two_processes_train_an_adapter_as_one_and_leave_its_base_alone(tmp_path):
    pytest.importorskip("peft")
    names = ["adapter", "own teacher", "drawn adapter"]
    check(tmp_path, names)
    given = lora(1)
    for name in names:
        found = json.loads((tmp_path / "1.json").read_text())[name]["weights"]
        for weight, after in zip(given.parameters(), found, strict=True):
            assert (weight.flatten().tolist() == after) is not weight.requires_grad


def sharded(folder):
    """Split a student's weights over the processes, as FSDP does; keep draws, and the gradient of a loss."""
    torch.distributed.init_process_group("gloo")
    rank, p, q = torch.distributed.get_rank(), llama(0).eval(), llama(1).eval()
    of_tokens = loss_of_full_logits(p, q)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    for part in (*q.model.layers, q):
        torch.distributed.fsdp.fully_shard(part, mesh=mesh, reshard_after_forward=True)
    found = {"drawn": drawn_by(q, rank)}
    of_tokens(q, together(UNEQUAL[4 * rank : 4 * rank + 4])).backward()
    found["gradient"] = [weight.grad.full_tensor().flatten().tolist() for weight in q.parameters()]
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def drawn_by(q, rank):
    """Draw other numbers of tokens in each process."""
    return continued(causal(q), [[3 + rank, 4]] * (2 + rank), (2,), 5 + 4 * rank, 7).ids.tolist()


def loss_of_full_logits(p, q):
    loss = TokenLoss(causal(p), causal(q), divergence_named("reverse_kl"), probe=torch.tensor([[3, 4]]))
    loss.sides = (Side(None, False), Side(None, False))  # as a trainer has it for such students
    return loss


@pytest.mark.slow
def test_a_student_split_over_processes_draws_and_learns_as_a_whole_one(tmp_path):
    both, p, q = in_two(tmp_path, [], "sharded"), llama(0).eval(), llama(1).eval()
    (loss_of_full_logits(p, q)(q, together(UNEQUAL[:8])) / 2).backward()  # a mean over the processes
    for rank, one in enumerate(both):
        assert one["drawn"] == drawn_by(q, rank)
        assert apart(one["gradient"], [weight.grad.flatten().tolist() for weight in q.parameters()]) < 1e-5


SPLIT = {"data": {"data": 1.0}, "drawn": {"student": 0.5, "teacher": 0.2, "data": 0.3}}


def by_trainer(folder, *changes):
    """Train under the Trainer in two processes, by FSDP or DDP; keep the weights, put together, and the losses."""
    found = {}
    for name, prefixes in SPLIT.items():
        for how in changes:
            more = (
                {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}} if how == "fsdp" else {}
            )
            args = arguments(
                folder, per_device_train_batch_size=4 if "RANK" in os.environ else 8, gradient_accumulation_steps=2, optim="sgd",
                max_steps=2, **({"ddp_backend": "gloo"} if "RANK" in os.environ else {}), **more,
            )  # fmt: skip
            if how == "fsdp":  # accelerate splits weights on accelerators alone, and torch does so on CPUs, too
                assert args.device.type == "cpu"
                PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            trainer = LanguageTrainer(
                teacher=llama(0), student=llama(1), args=args, objective="reverse_kl", max_new_tokens=8, prefixes=prefixes,
                train_dataset=UNEQUAL, eval_dataset=UNEQUAL[:13],
            )  # fmt: skip
            trainer.train()
            weights = [one.full_tensor() if hasattr(one, "full_tensor") else one for one in trainer.model.parameters()]
            found[f"{name} {how}"] = {
                "weights": [one.detach().flatten().tolist() for one in weights], "after": trainer.evaluate()["eval_loss"],
                "flops": trainer.flops, "tokens": trainer.tokens_generated, "is_split": trainer.is_fsdp_enabled,
            }  # fmt: skip
    return found


def trainers(folder, how):
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(by_trainer(folder, how)))


@pytest.mark.slow
def test_a_trainer_that_splits_weights_ends_with_those_of_one_process_and_of_whole_copies(tmp_path):
    split, copies = (in_two(tmp_path, [how], "trainers") for how in ("fsdp", "ddp"))
    alone = by_trainer(tmp_path, "alone")["data alone"]
    for one in split:
        assert all(run["is_split"] for run in one.values())
        assert apart(one["data fsdp"]["weights"], alone["weights"]) <= 1e-7
        assert one["data fsdp"]["after"] == pytest.approx(alone["after"], rel=1e-6)
    for one, other in zip(split, copies, strict=True):
        assert apart(one["drawn fsdp"]["weights"], other["drawn ddp"]["weights"]) <= 1e-7
        assert one["drawn fsdp"]["flops"] == other["drawn ddp"]["flops"]
        assert one["drawn fsdp"]["tokens"] == other["drawn ddp"]["tokens"] and sum(other["drawn ddp"]["tokens"].values()) > 0

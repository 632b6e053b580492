"""Trainer: transformers' own, with a divergence of a teacher in place of its loss, on prefixes of data, student and teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
import transformers
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from whichkl._arguments import typed
from whichkl._checks import InputError, cannot
from whichkl.distillation.language.causal import CausalModel, evaluating, inner_of
from whichkl.distillation.language.examples import (
    Example,
    ExampleStream,
    check_completions,
    check_lengths,
    read_examples,
    stacked,
    together,
)
from whichkl.distillation.language.memory import Forecast, forecast
from whichkl.distillation.language.objective import SOURCES, Prefixes, check_numbers, check_together, shares_of
from whichkl.distillation.language.partial_losses import StoredLoss, loss_of
from whichkl.distillation.language.rollouts import Rollouts, continued
from whichkl.distillation.language.stored_teacher import StoredTeacher
from whichkl.distillation.language.teacher_access import TeacherAccess, TokenScores, check_access, settled, teacher_of
from whichkl.distillation.language.token_loss import Side
from whichkl.distillation.language.training_arguments import check_names, checked_arguments
from whichkl.distillation.losses.specs import row_divergence_of, spec_of
from whichkl.divergences.divergence import RowDivergence

_STEPS_OF_A_BUDGET = 1_000
"""Steps into which a schedule of the learning rate divides a budget."""


class LanguageTrainer(transformers.Trainer):  # type: ignore[misc]
    """Train a language model on a frozen teacher's next-token laws.

    The loss is the mean over tokens of (1 − w) D(pₜ, qₜ) + w · (−log qₜ(yₜ)), p the teacher, q the student. Direction and
    prefixes are two choices: `objective` is D, and `prefixes` says whose continuations the tokens before are. The mean is over
    the tokens of a whole step, all micro-batches and processes, so that accumulation changes nothing. No logits of all tokens are
    kept where both models have a plain head.

    Everything else is `transformers.Trainer`: `TrainingArguments`, accelerate, callbacks, PEFT, checkpoints, `report_to`, resume.

    Args:
        teacher: p, a causal language model, which is only evaluated, without the adapter of PEFT that a student may have put into
            it; or what is left of one: a `StoredTeacher`, `TokenScores`, or None, where there is only the data's text. They allow
            fewer objectives and prefixes.
        student: q, the model that is trained, in place.
        objective: a row divergence, or its name, with its parameter after a colon: ``"jeffreys:0.3"``.
        prefixes: shares of ``"data"``, ``"student"`` and ``"teacher"``, which sum to 1; every sequence draws one.
        credit: ``"token"``; or ``"sequence"``, which adds the score-function term, so that the mean gradient is that of the
            reverse KL of whole sequences.
        hard_label_weight: w, for completions of the data.
        temperature: divides both logits inside D.
        max_new_tokens: where continuations are cut.
        args: `transformers.TrainingArguments`.
        train_dataset: texts, {'prompt': …, 'completion': …}, {'messages': […]}, or token ids in their place; an `IterableDataset`
            of them is read as it is needed.
        eval_dataset: the same, or several by name; the loss is on the data's own completions.
        processing_class: the tokenizer of both models; None where examples are token ids.
        vocabulary: the number of tokens, where there is no tokenizer and widths differ by padding.
        budget: FLOPs of the whole training, None for no limit: it stops before the step that, at the mean cost of those before,
            would exceed them. One that is less than the first step is refused.
        tell: called with the fraction that is done, after every step.
        **others: further arguments of `transformers.Trainer`: callbacks, optimizers, …

    Raises:
        InputError: the models can't be compared, an example can't be read, or the choices don't go together.

    Source: Agarwal et al. (2024), "On-policy distillation of language models"; Gu et al. (2024) for the sequence's gradient.
    """

    loss_is_scaled_for_ga = True

    @typed
    def __init__(
        self,
        *,
        teacher: Any,
        student: nn.Module,
        objective: str | RowDivergence = "forward_kl",
        prefixes: Prefixes = None,
        credit: str = "token",
        hard_label_weight: float = 0.0,
        temperature: float = 1.0,
        max_new_tokens: int = 64,
        args: Any = None,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: Any = None,
        vocabulary: int | None = None,
        budget: float | None = None,
        tell: Callable[[float], None] | None = None,
        **others: Any,
    ) -> None:
        self.divergence, self.shares = row_divergence_of(objective), shares_of(prefixes)
        self.objective = spec_of(self.divergence)
        check_together(self.divergence, self.shares, credit, hard_label_weight)
        numbers = {"hard_label_weight": hard_label_weight, "temperature": temperature}
        check_numbers(**numbers, max_new_tokens=max_new_tokens, budget=budget)
        q = CausalModel(student, "student")
        p = teacher_of(teacher, q)
        if isinstance(p, CausalModel) and p.adapted is None and inner_of(teacher) is inner_of(student):
            because = "it is the student, whose every change it would follow"
            raise InputError(cannot("use this teacher", because, "Pass copy.deepcopy(student), or a student with a PEFT adapter"))
        check_access(TeacherAccess.of(teacher), self.divergence, self.shares, **numbers)
        check_names(others, LanguageTrainer)
        args = checked_arguments(args, others, isinstance(train_dataset, IterableDataset))
        with evaluating(p, q):
            self.ends = settled(p, q, processing_class, vocabulary)
            self._reading = (processing_class, q.tokens, self.ends[0])
            evaluated = eval_dataset if isinstance(eval_dataset, Mapping) else {} if eval_dataset is None else {"": eval_dataset}
            held_out = {name: _with_completions(data, *self._reading, p) for name, data in evaluated.items()}
            train, known = _for_training(train_dataset, self._reading, bool(self.shares["data"]), p)
            check_lengths(known, (p, q), max_new_tokens, draws=self.shares["data"] < 1)
            self.token_loss = loss_of(
                p,
                q,
                self.divergence,
                [*known, *chain(*held_out.values())],
                most=max_new_tokens,
                has_credit=credit == "sequence",
                **numbers,
                probe=torch.tensor([next(iter(train))["prompt"]], dtype=torch.int64, device="cpu"),
            )
        self.max_new_tokens, self._teacher, self._student = max_new_tokens, p, q
        asked: Any = {name: [one.to_dict() for one in examples] for name, examples in held_out.items()}
        super().__init__(
            model=student,
            args=args,
            data_collator=partial(_collated, most=max_new_tokens),
            train_dataset=train,
            eval_dataset=asked.get("", asked) or None,
            processing_class=processing_class,
            **others,
        )
        if self.is_fsdp_enabled:  # outside of the model's call its head is a part of itself
            self.token_loss.sides = (Side(None, False), Side(None, False))
        self.tokens_generated, self.flops, self.budget = {"student": 0, "teacher": 0}, 0.0, budget
        """How many tokens were drawn, and what was spent, before a resume too; see `LanguageDistillation.flops`."""
        self._sizes = {who: sum(one.numel() for one in _weights(model)) for who, model in (("student", q), ("teacher", p))}
        self.add_callback(_Watch(self, tell))

    def forecast(self) -> Forecast | None:
        """Forecast the memory that training takes beyond the loaded models; None for streams, and where weights are sharded."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return None
        limits = (self.max_new_tokens, self.shares["data"] < 1)
        return forecast(self._student, self._teacher, self.token_loss.sides, self.args, self.train_dataset, *limits)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the schedule of the learning rate; with a budget it follows the share that is spent, not the number of steps.

        How many steps a budget buys depends on the prefixes. By steps, an arm that draws would stop at a higher learning rate.
        """
        budget = self.budget
        if budget is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        found = super().create_scheduler(_STEPS_OF_A_BUDGET, optimizer)
        if isinstance(found, torch.optim.lr_scheduler.LambdaLR):
            found.lr_lambdas = [partial(self._rate, rate, budget) for rate in found.lr_lambdas]
        return found

    def _rate(self, rate: Callable[[int], float], budget: float, _: int) -> float:
        return rate(round(_STEPS_OF_A_BUDGET * min(1.0, self.flops / budget)))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Return batches of an evaluation's examples, in any form that `train_dataset` may have."""
        is_known = eval_dataset is None or isinstance(eval_dataset, str)
        return super().get_eval_dataloader(eval_dataset if is_known else self._read(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Return batches of examples to predict, which is to evaluate."""
        return super().get_test_dataloader(self._read(test_dataset))

    def _read(self, data: Any) -> list[dict[str, list[int]]]:
        examples = _with_completions(data, *self._reading, self._teacher)
        if isinstance(self.token_loss, StoredLoss):
            self.token_loss.look_up(examples, self.max_new_tokens)
        return [one.to_dict() for one in examples]

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Collect the micro-batches of a step, draw their prefixes, and count the tokens that the loss is over."""
        batches = [Rollouts.of_batch(one) for one in _first(epoch_iterator, num_batches)]
        if not batches:
            return [], None
        sizes = [len(one.ids) for one in batches]
        drawn, source = self._with_prefixes(stacked(batches, torch.arange(sum(sizes), device="cpu")))
        starts = [sum(sizes[:k]) for k in range(len(sizes))]
        batches = [drawn.rows(start, start + size) for start, size in zip(starts, sizes, strict=True)]
        return [one.to_batch() for one in batches], self._counted(drawn, source, device)

    def _counted(self, drawn: Rollouts, source: Int[Tensor, " n"], device: torch.device) -> Int[Tensor, ""]:
        """Count what all processes drew and will read in this step; return the number of tokens that its loss is over."""
        here = torch.zeros(len(SOURCES), 2, dtype=torch.int64, device="cpu")
        here.index_add_(0, source, torch.stack([drawn.end - drawn.begin, drawn.end], 1))
        tokens, read = self.accelerator.gather(here[None].to(device)).sum(0).unbind(1)
        for number, name in enumerate(SOURCES):
            if name != "data":
                self.tokens_generated[name] += int(tokens[number])
                self.flops += 2 * self._sizes[name] * int(read[number])
        self.flops += (6 * self._sizes["student"] + 2 * self._sizes["teacher"]) * int(read.sum())
        if self.budget is not None and self.state.global_step == 0 and self.flops > self.budget:
            because = f"the first step alone costs {self.flops:.3g} FLOPs"
            instead = f"Use a budget of many steps, say {100 * self.flops:.0e}, or a smaller batch"
            raise InputError(cannot(f"train with `budget={self.budget:g}`", because, instead))
        count: Tensor = tokens.sum()
        return count

    def _with_prefixes(self, given: Rollouts) -> tuple[Rollouts, Int[Tensor, " n"]]:
        """Replace completions by continuations drawn from the student or the teacher, and return whose each is."""
        # of the run's seed, the step and the process: the same after a resume, whatever was drawn before
        rank = self.accelerator.process_index
        generator = torch.Generator().manual_seed(self.args.seed)
        seeds = torch.randint(2**31, (2,), generator=generator, device="cpu") + 1_000_003 * self.state.global_step + 7_919 * rank
        shares = torch.tensor([self.shares[name] for name in SOURCES], dtype=torch.float64, device="cpu")
        chooser = torch.Generator().manual_seed(int(seeds[0]))
        source = torch.multinomial(shares, len(given.ids), replacement=True, generator=chooser)
        parts, rows = [], []
        for number, name in enumerate(SOURCES):
            chosen = (source == number).nonzero()[:, 0]
            # processes that share a student's weights draw together, if only to help the others
            helps = self.is_fsdp_enabled and name == "student" and self.shares[name] > 0
            if not len(chosen) and not helps:
                continue
            which = chosen if len(chosen) else torch.zeros(1, dtype=torch.int64, device="cpu")
            part = Rollouts(given.ids[which], given.begin[which], given.end[which], given.cut[which])
            part = part if name == "data" else self._continued(name, part, int(seeds[1]) + number)
            if len(chosen):
                rows.append(chosen)
                parts.append(part)
        return stacked(parts, torch.cat(rows).argsort()), source

    def _continued(self, name: str, given: Rollouts, seed: int) -> Rollouts:
        """Draw continuations of the prompts from the student or the teacher."""
        drawing: Any = self._student if name == "student" else self._teacher
        prompts = [row[:begin] for row, begin in zip(given.ids.tolist(), given.begin.tolist(), strict=True)]
        with evaluating(drawing):
            return continued(drawing, prompts, self.ends, self.max_new_tokens, seed)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this micro-batch's share of the step's mean over tokens."""
        rollouts = Rollouts.of_batch(inputs)
        count = (rollouts.end - rollouts.begin).sum() if num_items_in_batch is None else num_items_in_batch
        # gradients are averaged over the processes
        loss = self.token_loss(model, rollouts) * (1 if num_items_in_batch is None else self.accelerator.num_processes) / count
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> tuple[Tensor, None, None]:
        """Return the loss on the data's own completions, and count its tokens."""
        rollouts = self._without_repeats(Rollouts.of_batch(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            total = self.token_loss(model, rollouts).detach().double()
        count = (rollouts.end - rollouts.begin).sum().to(total)
        self._evaluated += torch.stack([total, count]).cpu()
        return (total / count.clamp(min=1)).to(self.args.device), None, None

    def _without_repeats(self, given: Rollouts) -> Rollouts:
        """Take the loss from examples that only fill up the last batches of an evaluation, one per process."""
        state, n = self.accelerator.gradient_state, len(given.ids)
        if not state.end_of_dataloader or state.remainder <= 0:
            return given
        repeats = self.accelerator.process_index * n + torch.arange(n, device="cpu") >= state.remainder
        return Rollouts(given.ids, torch.where(repeats, given.end, given.begin), given.end, given.cut)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as `Trainer` does, but report the mean over tokens, where it has the mean of its batches' means."""
        self._evaluated = torch.zeros(2, dtype=torch.float64, device="cpu")
        output = super().evaluation_loop(*args, **kwargs)
        if self.model_wrapped is self.model:  # else `train` leaves it unwrapped, and processes don't share gradients
            self.model._is_accelerate_prepared = False
        total = self.accelerator.gather(self._evaluated.to(self.args.device)).view(-1, 2).sum(0)
        for name in [name for name in output.metrics if name.endswith("_loss")]:
            output.metrics[name] = float(total[0] / total[1])
        return output


def _for_training(data: Any, reading: tuple[Any, int, int], needs_completions: bool, teacher: Any) -> tuple[Any, list[Example]]:
    """Return the examples as a data loader gets them, and those that are known before training."""
    if not isinstance(data, IterableDataset):
        known = read_examples(data, *reading)
        if needs_completions:
            check_completions(known)
        return [one.to_dict() for one in known], known
    stream = ExampleStream(data, *reading, needs_completions)
    because = "a stored teacher's examples are looked up first" if isinstance(teacher, StoredTeacher) else "it is empty"
    if isinstance(teacher, StoredTeacher) or next(iter(stream), None) is None:
        raise InputError(cannot("train on this stream", because, "Pass the examples as a list"))
    return stream, []


def _with_completions(data: Any, tokenizer: Any, tokens: int, end: int, teacher: Any) -> list[Example]:
    """Read the examples of an evaluation, each of which needs a completion."""
    do = "evaluate on the data's completions"
    if isinstance(teacher, TokenScores):
        because = "the teacher only scores tokens, which have to be drawn from the student for a KL"
        raise InputError(cannot(do, because, "Leave `eval_dataset` out"))
    examples = read_examples(data, tokenizer, tokens, end)
    if any(one.completion is None for one in examples):
        because = "some examples of `eval_dataset` have no completion"
        raise InputError(cannot(do, because, "Add them, or use `sequence_kl` on prompts"))
    return examples


class _Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """Stops at the budget, reports progress, and keeps the counts in checkpoints."""

    def __init__(self, trainer: LanguageTrainer, tell: Callable[[float], None] | None) -> None:
        self.trainer, self.tell = trainer, tell or (lambda done: None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        counts = state.stateful_callbacks.get("LanguageTrainer")  # those of the checkpoint that the run resumes from
        if counts is not None:
            self.trainer.flops, self.trainer.tokens_generated = counts["flops"], dict(counts["tokens_generated"])
        if state.global_step == 0 and (memory := self.trainer.forecast()) is not None:
            memory.check()
        self.tell(0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        counts = {"flops": self.trainer.flops, "tokens_generated": dict(self.trainer.tokens_generated)}
        state.stateful_callbacks["LanguageTrainer"] = counts
        budget, spent = self.trainer.budget, self.trainer.flops
        if budget is not None and spent + spent / state.global_step > budget:  # the next step, at the mean cost of those so far
            control.should_training_stop = True
        done = max(0.0 if budget is None else spent / budget, state.global_step / max(1, state.max_steps))
        self.tell(1.0 if control.should_training_stop else min(1.0, done))


def _weights(model: Any) -> Iterator[Tensor]:
    """Yield a model's parameters; a teacher that is no model has none."""
    return model.module.parameters() if isinstance(model, CausalModel) else iter(())


def _first(iterator: Iterator[Any], count: int) -> list[Any]:
    return [one for _, one in zip(range(count), iterator, strict=False)]


def _collated(examples: Sequence[Mapping[str, Sequence[int]]], most: int) -> dict[str, Tensor]:
    return together(examples, most).to_batch()

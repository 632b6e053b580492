"""Run: the training inside `language_model`, from its last checkpoint if there is one, and what is measured on the way."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import transformers

from whichkl._checks import InputError, cannot
from whichkl.distillation.language.causal import CausalModel, evaluating
from whichkl.distillation.language.loading import without_bars
from whichkl.distillation.language.record import Record
from whichkl.distillation.language.result import Measured, Midway
from whichkl.distillation.language.trainer import LanguageTrainer
from whichkl.files.reading import checked
from whichkl.process.seeds import kept_random_states


@dataclass
class Run:
    """A training that is recorded, and can resume."""

    student: CausalModel
    record: Record
    measure: Callable[[], Measured]
    """Compares the student, as it is then, with its teacher."""
    evaluations: int
    say: Callable[[str, float], None]
    midway: list[Midway] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    """Of a training that ended: steps, FLOPs, CPU seconds, the logged losses, and what was measured on the way."""
    cpu_seconds: float = 0.0
    memory: str = ""
    """The forecast before the first step."""

    def measured(self) -> Measured:
        """Compare the student with its teacher; its mode is then that of evaluation."""
        self.student.module.eval()
        return self.measure()

    def trainer_of(self, args: Any, **choices: Any) -> LanguageTrainer:
        """Make the trainer, which checks the choices; with a journal its checkpoints are there."""
        if self.record.folder is not None:
            args = copy.copy(args)
            args.output_dir, args.save_total_limit, args.save_only_model = str(self.record.folder), None, False
        with kept_random_states():
            self.trainer = LanguageTrainer(student=self.student.module, args=args, tell=self._told, **choices)
        if self.record.journal is not None and self.trainer.accelerator.num_processes > 1:
            because = f"{self.trainer.accelerator.num_processes} processes train"
            raise InputError(cannot("keep a journal", because, "Use `LanguageTrainer`, and `save_steps` of its `args`"))
        self.trainer.remove_callback(transformers.PrinterCallback)  # it prints every loss
        return self.trainer

    def train(self) -> None:
        """Train the student, unless an earlier run has."""
        done = self.record.trained(self.student.module)
        if done is None:
            with kept_random_states(), without_bars():
                transformers.set_seed(self.trainer.args.seed)  # of dropout
                done = self._trained()
            self.record.keep_trained(self.student.module, done)
        self.memory = str(done["memory"])
        self.figures = {"steps": int(done["steps"]), "flops": float(done["flops"]), "cpu_seconds": float(done["cpu_seconds"])}
        self.figures |= {"history": tuple(map(float, done["losses"])), "midway": tuple(_read(done["midway"]))}
        self.student.module.eval()

    def _trained(self) -> dict[str, Any]:
        resumed = self.record.latest()
        if resumed is not None:
            self.midway, self.cpu_seconds = _read(resumed[1]["midway"]), float(resumed[1]["cpu_seconds"])
            self.memory = str(resumed[1]["memory"])
        if self.record.journal is not None:
            self.trainer.add_callback(self.record.keeper(self._so_far))
        self.begin = time.process_time()
        self.trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed[0]))
        losses = [float(one["loss"]) for one in self.trainer.state.log_history if "loss" in one]
        return {"steps": self.trainer.state.global_step, "flops": self.trainer.flops, "losses": losses, **self._so_far()}

    def _so_far(self) -> dict[str, Any]:
        """Return what a checkpoint keeps besides the trainer's own state; the time is that before a resume, too."""
        spent = self.cpu_seconds + time.process_time() - self.begin
        return {"cpu_seconds": spent, "memory": self.memory, "midway": [one.to_dict() for one in self.midway]}

    def _told(self, done: float) -> None:
        """Report progress, and measure where another part of the run is done."""
        if not self.memory and done == 0:
            self.memory = str(self.trainer.forecast() or "unknown")
            self.say(f"training takes {self.memory.split(',')[0]}", 0.0)
        self.say("training", done)
        if done < 1 and len(self.midway) < math.floor(done * (self.evaluations + 1)):
            begin = time.process_time()
            with evaluating(self.student):
                found = self.measured()
            self.midway.append(Midway(self.trainer.state.global_step, float(self.trainer.flops), found))
            self.cpu_seconds -= time.process_time() - begin


def _read(midway: Any) -> list[Midway]:
    return list(checked(tuple[Midway, ...], midway))

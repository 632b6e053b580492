"""Signatures: which argument of a loss is the teacher, the student, the mask, the labels, by their names."""

from __future__ import annotations

import dis
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from whichkl._checks import InputError, cannot

_NAMES = {
    "mask": r"(.*_)?masks?",
    "labels": r"(hard_?|true_|gt_)?(label|target)s?(_ids?)?|y|gt|ground_truth",
    "teacher": r"(.*_)?(teacher|tea|ref|reference)(_.*)?|t|(logits?|y|z|out)_(t|p)|(t|p)_(logits?|out)|target_logits",
    "student": r"(.*_)?(student|stu|policy)(_.*)?|s|(logits?|y|z|out)_(s|q)|(s|q)_(logits?|out)|(outputs?|logits?|preds?)",
}
"""What arguments are called, as regular expressions for the whole name; the first that fits decides."""
_HOLDS_PROBABILITIES = re.compile("prob|log_?p(?!art)|hidden|state|feature|embed")


def parameters_of_call(loss: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a loss, of `forward` for a module; none where they can't be known."""
    try:
        return inspect.signature(loss.forward if isinstance(loss, torch.nn.Module) else loss).parameters
    except (TypeError, ValueError):
        return {}


def takes(loss: Callable[..., Any], name: str) -> bool:
    """Whether a function has an argument of this name, and its code reads it.

    >>> takes(lambda mask: mask, "mask"), takes(lambda mask: 1, "mask"), takes(lambda labels: 1, "mask")
    (True, False, False)
    """
    code = getattr(loss, "__code__", None)
    if name not in parameters_of_call(loss):
        return False
    if code is None or name in code.co_cellvars:
        return True
    return any(name in (one.argval if isinstance(one.argval, tuple) else (one.argval,)) for one in dis.get_instructions(code))


def roles(loss: Callable[..., Any]) -> dict[str, str]:
    """Return the argument's name of each role that the signature tells, where it tells teacher and student; else nothing.

    >>> roles(lambda student_logits, teacher_logits, loss_mask=None, beta=0.5: 0)
    {'student': 'student_logits', 'teacher': 'teacher_logits', 'mask': 'loss_mask'}
    """
    found: dict[str, str] = {}
    for name, parameter in parameters_of_call(loss).items():
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            continue
        role = next((role for role, names in _NAMES.items() if re.fullmatch(names, name.lower())), None)
        is_option = isinstance(parameter.default, int | float | str) or len(name) == 1 and name.isupper()
        if role is not None and role not in found and not is_option:
            found[role] = name
    return found if {"teacher", "student"} <= set(found) else {}


def holds_no_logits(names: Mapping[str, str]) -> str:
    """Return the name of an argument that takes no logits, by its name; "" if there is none."""
    return next((names[role] for role in ("student", "teacher") if _HOLDS_PROBABILITIES.search(names[role].lower())), "")


def is_torch_convention(loss: Callable[..., Any]) -> bool:
    """Whether a loss is called as torch's `kl_div`: the student's log-probabilities, then the teacher's probabilities."""
    parameters = list(parameters_of_call(loss))
    return parameters[:2] == ["input", "target"] and (hasattr(loss, "log_target") or "log_target" in parameters)


def has_log_target(loss: Callable[..., Any]) -> bool:
    """Whether a loss of torch's convention takes the teacher's log-probabilities."""
    default = parameters_of_call(loss).get("log_target")
    return bool(getattr(loss, "log_target", default is not None and default.default is True))


def call_by_roles(loss: Callable[..., Any], names: Mapping[str, str]) -> Callable[..., Any]:
    """Return the call of a loss by its arguments' names; a mask is left out where there is none."""
    parameters = parameters_of_call(loss)
    ahead = [role for role, name in names.items() if parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY]

    def call(loss: Any, *, knobs: Any, **given: Any) -> Any:
        named = {names[role]: given[role] for role in names if role not in ahead and given[role] is not None}
        return loss(*(given[role] for role in ahead if given[role] is not None), **named, **knobs)

    return call


def instance_of(loss: type) -> Callable[..., Any]:
    """Return an instance of a class of losses, made without arguments."""
    try:
        made = loss()
    except Exception as error:
        because = f"{loss.__name__} is a class, and without arguments it raises {type(error).__name__}: {error}"
        raise InputError(cannot("audit this loss", because, f"Pass an instance, {loss.__name__}(…)")) from error
    if not callable(made):
        because = f"{loss.__name__} is a class whose instances can't be called"
        raise InputError(cannot("audit this loss", because, "Pass the loss itself"))
    return made  # type: ignore[no-any-return]

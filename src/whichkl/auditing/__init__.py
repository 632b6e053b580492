"""Audits: what a distillation loss computes, found out by calling it."""

from whichkl.auditing.adapters import ADAPTERS, Adapter
from whichkl.auditing.examine import audit
from whichkl.auditing.matching import Identified
from whichkl.auditing.result import Audit, Check

__all__ = ["ADAPTERS", "Adapter", "Audit", "Check", "Identified", "audit"]

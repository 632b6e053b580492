"""Audits: what a distillation loss computes, found out by calling it."""

from whichkl.distillation.audit.adapters import ADAPTERS, Adapter
from whichkl.distillation.audit.examine import audit
from whichkl.distillation.audit.result import Audit, Check
from whichkl.distillation.audit.search import Identified

__all__ = ["ADAPTERS", "Adapter", "Audit", "Check", "Identified", "audit"]

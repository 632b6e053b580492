"""Demo: the main job on five inputs, from experiments (numbers) to a story (the page)."""

from whichkl.demo.run import STEPS, Demo, run_demo
from whichkl.demo.story import write_demo

__all__ = ["STEPS", "Demo", "run_demo", "write_demo"]

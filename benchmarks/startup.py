"""What importing, asking for help and a first fit cost, compared with `import torch`: medians of interleaved fresh processes."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import whichkl

PETALS = Path(whichkl.__file__).parent / "problems" / "data" / "petals.csv"
FIT = "import whichkl as wk; wk.fit(wk.Target(log_prob=lambda x: -x.square().sum(-1) / 2, dim=2))"
COMMANDS = {
    "import torch": [sys.executable, "-c", "import torch"],
    "import whichkl": [sys.executable, "-c", "import whichkl"],
    "import whichkl, every name": [sys.executable, "-c", "import whichkl as w; [getattr(w, n) for n in w.__all__]"],
    "a first fit, imports included": [sys.executable, "-c", FIT],
    "a first fit of samples": [sys.executable, "-c", "import torch, whichkl as wk; wk.fit(torch.randn(1000, 5))"],
    "whichkl fit petals.csv --json": [sys.executable, "-m", "whichkl", "fit", str(PETALS), "--json"],
    "whichkl --help": [sys.executable, "-m", "whichkl", "--help"],
}


def seconds(command):
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def main(rounds=7):
    for command in COMMANDS.values():
        seconds(command)
    times = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, value in medians.items():
        print(f"{name:<30} {value:6.3f} s   {value / medians['import torch']:5.2f} × import torch")
    print(json.dumps({"benchmark": "startup", **{name: round(value, 4) for name, value in medians.items()}}))


if __name__ == "__main__":
    main()

"""Draw language_study.png of a finished study: python docs/images/language_study.py STUDY (needs chromium)."""

import subprocess
import sys
import tempfile
from pathlib import Path

from whichkl.plots.arms import tradeoff
from whichkl.study import Study


def main():
    study = Study.load(sys.argv[1])
    figure = tradeoff(study.rows, study.verdict, "forward_kl", "reverse_kl")
    for trace in figure.data:
        name = trace.hovertext[0].rsplit(" · ", 1)[-1] if trace.hovertext else trace.name
        trace.name = name.replace(":0.5", "").replace("@", " on ").replace("_kl", " KL").replace("_", " ") + " prefixes"
    figure.update_layout(template="plotly_white", width=1000, height=520, margin={"t": 10, "l": 10, "r": 10, "b": 10})
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        figure.write_html(page, include_plotlyjs=True, config={"displayModeBar": False})
        out = Path(__file__).with_suffix(".png")
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1020,560", "--hide-scrollbars"]
        subprocess.run([*command, "--virtual-time-budget=8000", f"--screenshot={out}", page.as_uri()], check=True)


if __name__ == "__main__":
    main()

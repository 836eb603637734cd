"""Commands and Python examples of Markdown pages, and how a test may run each in a few seconds.

The convention: in a fenced block without a language, or with `sh`, every line is a command; `python` blocks are run too, one
namespace a page, and one whose first line is a comment with a file name is written to that file. Output goes into `text`
blocks. Whatever a test changes about a documented command is in the tables below, and nowhere else.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "results").rglob("*.md")])

#: Blocks of these languages hold commands, line by line.
SHELL = ("", "sh", "bash", "console", "shell")
#: Blocks of these hold none.
OTHER = ("python", "text", "toml", "yaml", "json", "latex", "csv", "html")

#: Names that stand for something of the reader's → what the test puts there.
STANDS_FOR = {"folder:PATH": "folder:images", "DIR": "images", "--data-root …": "--data-root data"}

#: What a test changes in Python examples, so that they take seconds.
SMALLER = {"features=32": "features=2", "epochs=15": "epochs=1", "epochs=5": "epochs=1"}

#: Commands that the test of pages leaves to another test or check: a pattern of the whole command → where that is.
#: `pytest -m MARKER` runs the tests with a marker; `.ci/run` is the check before a change lands.
ELSEWHERE = {
    r"pip install .*": ".ci/run",  # what it names is looked up here
    r"pytest( -n 2| -m \w+)?": ".ci/run",
    r"ruff .*|mypy|\.ci/run": ".ci/run",
    r"tests/slurm/st(art|op) .*|apt-get .* slurm-wlm munge": "tests/conftest.py::slurm_cluster",
    r"bench run .*--executor ray.*": "tests/test_ray.py::test_a_node_is_removed_in_mid_sweep",
    r"bench run .*--executor slurm.*": "tests/test_slurm.py::test_a_closed_runner_is_taken_up",
    r"apt-get install .*slurm-wlm.*|tests/slurm/(start|stop) .*": "tests/test_slurm.py::test_a_closed_runner_is_taken_up",
    r"anomalib train .*": "tests/test_lightning.py::test_the_anomalib_command_trains_tests_predicts_and_exports",
}

#: Models whose pretrained weights would be downloaded: their runs are planned (`--dry-run`), not made.
PRETRAINED = ("anomalib:Padim", "anomalib:Patchcore")

#: Commands that may end with another exit code than 0: the two folders do differ, the images are made up.
ENDS_WITH = {"diff": (0, 1), "data": (0, 1)}


@dataclass(frozen=True)
class Block:
    """A fenced block: the language, its first line's number on the page, and its text."""

    language: str
    line: int
    text: str


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of `page`, also indented ones."""
    lines, k = page.read_text().splitlines(), 0
    while k < len(lines):
        fence = re.match(r"\s*```\s*(\w*)", lines[k])
        k += 1
        if fence:
            first = k
            while not re.match(r"\s*```\s*$", lines[k]):
                k += 1
            yield Block(fence[1], first + 1, "\n".join(lines[first:k]) + "\n")
            k += 1


def commands(block: Block) -> Iterator[str]:
    """The commands of a shell block, one by one: continued lines joined, comments and prompts dropped, `&&` split."""
    for line in re.sub(r"\\\n\s*", " ", block.text).splitlines():
        line = line.strip().removeprefix("$ ")
        words = shlex.split(line, comments=True)
        if not words:
            continue
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            yield shlex.join(words[:end]).replace("'tests/golden/*.npz'", "tests/golden/*.npz")
            words = words[end + 1 :]


def bare(command: str) -> str:
    """`command` without the assignments to environment variables in front: a test has its own path and clusters."""
    return re.sub(r"^([A-Z_]+=\S+ )+", "", command)


def inline_commands(page: Path) -> list[str]:
    """The `bench …` in running text that are whole commands: with a subcommand and more, and no gap."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    found = [" ".join(span.split()) for span in re.findall(r"(?<!`)`(bench [^`]+)`(?!`)", text)]
    return [span for span in found if len(span.split()) > 2 and not re.search(r"…$|…[^ ]| [A-Z]+\b", without_stand_ins(span))]


def without_stand_ins(command: str) -> str:
    """`command` with what the test puts in place of the reader's own names."""
    for name, here in STANDS_FOR.items():
        command = re.sub(rf"(?<![\w.]){re.escape(name)}(?!\w)", here, command)
    return command


def shrunk(command: str) -> list[str]:
    """The words of a documented `bench` command as a test runs it: tiny networks, few of them, one epoch, this process."""
    words = shlex.split(without_stand_ins(command))
    name, text = words[1], command
    if name == "run" and "--dry-run" not in words:
        if any(model in text for model in PRETRAINED):
            return [*words, "--dry-run"]
        config = next((ROOT / word for word in words if word.endswith(".yaml")), None)
        text += config.read_text() if config is not None and config.is_file() else ""
        if "--executor" not in words and not re.search(r"--(workers|timeout|retries)", command):
            words += ["--executor", "inline"]
        if "--steps" in words or re.search(r"^steps:", text, re.MULTILINE):
            words += ["--steps", "2"]
        else:
            words += ["--epochs", "1"]
        if re.search(r"\b(ganomaly\w*|v?ae|\w*gan|egbad|alad)\b", text):
            words += ["--limit", "3"]
            words += [] if "--hparams" in words else ["--hparams", "features=2,latent_dim=4"]
    if name == "speed":
        words += ["--image_size", "16", "--features", "2", "--batch_size", "2", "--repeats", "1", "--images", "8"]
        words += ["--peers", "authors"]
    if name == "verify":
        words = [*words[:2], *(w for w in words[2:] if not w.endswith(".npz")), "tests/golden/*.npz"]
    return words

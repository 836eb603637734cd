"""Every command and example in the documentation is run, page by page, each page in a folder of its own.

`documentation.py` says what is changed to make them quick, and which commands other tests cover. A command that neither runs
nor is covered fails here.
"""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import documentation
import numpy as np
import pytest
from conftest import GOLDEN, blobs
from documentation import (
    ELSEWHERE,
    ENDS_WITH,
    OTHER,
    PAGES,
    ROOT,
    SHELL,
    SMALLER,
    bare,
    blocks,
    commands,
    inline_commands,
    shrunk,
)
from PIL import Image
from test_datasets import write_idx

from ganomaly_plugin.cli import build_parser
from ganomaly_plugin.datasets import torchvision_table

STORIES = [page for page in PAGES if page.parent in (ROOT, ROOT / "docs")]
SWEEPS = [page for page in PAGES if page not in STORIES]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the reader has it: the repository's files, some images, data sets, and results of another machine."""
    for name in ("benchmark_configs", "constraints.txt", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "golden").symlink_to(GOLDEN)
    rng = np.random.default_rng(0)
    for k, image in enumerate(((blobs(24, side=32) + 1) * 127).astype(np.uint8)):
        part = "train/good" if k < 12 else "test/good" if k < 18 else "test/broken"
        (tmp_path / "images" / part).mkdir(parents=True, exist_ok=True)
        noise = rng.integers(0, 100, (32, 32), dtype=np.uint8) if k >= 18 else 0
        Image.fromarray(image[0] // 2 + noise).save(tmp_path / "images" / part / f"{k}.png")
    for part, n in (("train", 120), ("t10k", 40)):
        raw = tmp_path / "data" / "MNIST" / "raw"
        write_idx(raw / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28)))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(n) % 10)
    for part in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
        rows = rng.integers(0, 256, (20, 3073), dtype=np.uint8)
        rows[:, 0] = np.arange(20) % 10
        (tmp_path / "data" / "cifar-10-batches-bin").mkdir(exist_ok=True)
        (tmp_path / "data" / "cifar-10-batches-bin" / f"{part}.bin").write_bytes(rows.tobytes())
    monkeypatch.setattr(torchvision_table, "PUBLISHED_MD5", {})
    monkeypatch.setenv("GANOMALY_DATA_ROOT", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def prepare(words: list[str], desk: Path, bench: Any) -> list[str]:
    """Put there what a command names and the page did not make; its shell patterns expanded."""
    for word in words:
        if word == "results/theirs" and not (desk / word).exists():
            made = ["--models", "pca,mean_intensity", "--datasets", "digits", "--classes", "0", "--executor", "inline"]
            assert bench("run", *made, "--out", word)[0] == 0
        elif re.fullmatch(r"results/\w+", word) and (ROOT / word).is_dir() and not (desk / word).exists():
            shutil.copytree(ROOT / word, desk / word)
    return [name for word in words for name in (expanded(word, desk) if "*.npz" in word else [word])]


def expanded(pattern: str, desk: Path) -> list[str]:
    found = sorted(str(path.relative_to(desk)) for path in desk.glob(pattern))
    assert found, f"nothing is called {pattern}"
    return found[:1]  # test_verify replays them all


def run_command(command: str, desk: Path, bench: Any) -> None:
    command = bare(command)
    covered = next((where for pattern, where in ELSEWHERE.items() if re.fullmatch(pattern, command)), None)
    if covered is not None:
        if command.startswith("pip install"):
            check_pip(shlex.split(command)[2:])
        elif command.startswith("bench "):
            parse(command)
        return
    assert command.startswith("bench "), f"no test runs {command!r}; see documentation.py"
    words = prepare(shrunk(command)[1:], desk, bench)
    code, out, err = bench(*words)
    assert code in ENDS_WITH.get(words[0], (0,)), f"{command}\nran as: bench {shlex.join(words)}\n{out}{err}"
    assert out or err or "--out" in words, f"{command} printed nothing"


def check_pip(words: list[str]) -> None:
    """Extras and files that `pip install` names exist."""
    extras_section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    for word in words:
        extras = re.fullmatch(r"(?:\.|ganomaly-plugin)\[([\w,]+)\]", word)
        if extras:
            assert set(extras[1].split(",")) <= set(re.findall(r"^(\w+) = ", extras_section, re.MULTILINE)), word
        elif word.endswith(".txt"):
            assert (ROOT / word).is_file(), word


def run_python(text: str, desk: Path, namespace: dict[str, Any]) -> None:
    file = re.match(r"# (\w[\w/]*\.py)\n", text)
    if file:
        path = desk / file[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        importlib.invalidate_caches()
        return
    for there, here in SMALLER.items():
        text = text.replace(there, here)
    exec(compile(text, "the page", "exec"), namespace)


@pytest.mark.parametrize("page", [page for page in STORIES if page.name != "CONTRIBUTING.md"], ids=name_of)
def test_a_page_can_be_followed(page: Path, desk: Path, bench: Any) -> None:
    namespace: dict[str, Any] = {"normal_images": blobs(64), "images": blobs(8, seed=1)}
    before = set(sys.modules)
    try:
        for block in blocks(page):
            assert block.language in (*SHELL, *OTHER), f"{page.name}:{block.line}: give the block a language"
            try:
                if block.language == "python":
                    run_python(block.text, desk, namespace)
                elif block.language in SHELL:
                    for command in commands(block):
                        run_command(command, desk, bench)
            except Exception as error:
                raise AssertionError(f"{page.name}, block at line {block.line}: {error}") from error
    finally:
        for module in set(sys.modules) - before:  # the page's own, so that another page may use their names
            if str(getattr(sys.modules[module], "__file__", "")).startswith(str(desk)):
                del sys.modules[module]


@pytest.mark.parametrize("page", SWEEPS, ids=name_of)
def test_published_commands_still_plan_their_sweeps(page: Path, desk: Path, bench: Any) -> None:
    """The sweeps behind results/ are planned, where their data is made up here; they are not run again."""
    listed = [command for block in blocks(page) if block.language in SHELL for command in commands(block)]
    for command in [*listed, *inline_commands(page)]:
        parse(command)
        words = shlex.split(documentation.without_stand_ins(command))[1:]
        texts = [command, *((ROOT / word).read_text() for word in words if word.endswith(".yaml"))]
        if words[0] == "run" and not any(re.search(r"elpv|\bfashion", text) for text in texts):
            code, out, err = bench(*words, "--dry-run")
            assert code == 0 and " jobs: " in out, f"{command}: {err}"


@pytest.mark.parametrize("page", STORIES, ids=name_of)
def test_commands_in_running_text(page: Path) -> None:
    for command in inline_commands(page):
        parse(command)


def parse(command: str) -> None:
    """`command` is one that the parser takes, options and config file included."""
    words = shlex.split(documentation.without_stand_ins(command))
    assert words[0] == "bench", command
    build_parser().parse_args(words[1:])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_what_is_said_to_be_covered_is() -> None:
    used = {c for page in STORIES for b in blocks(page) if b.language in SHELL for c in commands(b)}
    for pattern, where in ELSEWHERE.items():
        file, _, test = where.partition("::")
        assert (ROOT / file).is_file() and (not test or f"def {test}(" in (ROOT / file).read_text()), where
        assert any(re.fullmatch(pattern, bare(command)) for command in used), f"no page has {pattern}"


def test_a_command_that_nothing_covers_fails(tmp_path: Path, desk: Path, bench: Any) -> None:
    for command, why in (("make it-so", "no test runs"), ("bench rum --models ae", "rum"), ("bench ls nothing*", "Nothing")):
        with pytest.raises(AssertionError, match=why):
            run_command(command, desk, bench)
    page = tmp_path / "page.md"
    page.write_text(
        "Text.\n\n```\nbench ls  # all\n$ bench run \\\n    --models ae && pytest\n```\n"
        "`bench tables x --format md`, `bench run`\n"
    )
    (block,) = blocks(page)
    assert list(commands(block)) == ["bench ls", "bench run --models ae", "pytest"]
    assert inline_commands(page) == ["bench tables x --format md"]

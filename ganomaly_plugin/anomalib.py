"""Our models in anomalib's own registry and benchmark: `python -m ganomaly_plugin.anomalib benchmark --config FILE`.

anomalib's train, test, predict and export commands take `ganomaly_plugin.Ganomaly` as it is. Its `get_model` and, through
that, its benchmark take class paths of its own only; `register()` adds ours. Nothing else in this package calls it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ganomaly_plugin.errors import BenchError, InvalidInput, one_line
from ganomaly_plugin.registry import anomalib_modules

USAGE = "usage: python -m ganomaly_plugin.anomalib benchmark --config FILE"


def register() -> list[str]:
    """Let anomalib's `get_model({"class_path": "ganomaly_plugin.…"})` find our modules.

    Returns:
        The class paths it takes from now on, in this process.

    Raises:
        InvalidInput: anomalib is not installed.
    """
    try:
        import anomalib.models as models
    except ImportError as error:
        raise InvalidInput(f"anomalib cannot be imported: {one_line(error)}. Run pip install anomalib.") from error
    models.ALLOWED_MODULES.add("ganomaly_plugin")
    return [f"ganomaly_plugin.{name}" for name in anomalib_modules()]


def benchmark(config: str) -> None:
    """Run anomalib's benchmark pipeline on a YAML file, with our modules registered.

    Raises:
        InvalidInput: No such file, or a job failed: anomalib itself would say so in its log only, and exit with 0.
    """
    if not Path(config).is_file():
        raise InvalidInput(f"No benchmark config at {config}. Give the path of a YAML file.")
    register()
    from anomalib.pipelines import Benchmark
    from jsonargparse import Namespace

    before = set(Path("runs/benchmark").glob("*/results.csv"))
    Benchmark().run(Namespace(config=config))
    if set(Path("runs/benchmark").glob("*/results.csv")) == before:
        raise InvalidInput("anomalib's benchmark wrote no results. Read runs/pipeline.log for the reason.")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0 done, 1 when the benchmark failed, 2 for wrong usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    if len(words) == 2 and words[1].startswith("--config="):
        words = [words[0], "--config", words[1].removeprefix("--config=")]
    if words in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    if len(words) != 3 or words[:2] != ["benchmark", "--config"]:
        print(USAGE, file=sys.stderr)
        return 2
    try:
        benchmark(words[2])
    except BenchError as error:
        print(f"ganomaly_plugin.anomalib: error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

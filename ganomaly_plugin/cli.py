"""The `bench` command: parsing only. What a command does is in `commands`; nothing here waits for torch."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from ganomaly_plugin import __version__
from ganomaly_plugin.errors import BenchError, CannotStore, InvalidInput, one_line, unknown
from ganomaly_plugin.escape import printable
from ganomaly_plugin.selection import split_list, unquoted
from ganomaly_plugin.streams import mend_streams

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
_TYPE_NAMES = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false"}


def listed(value: Any) -> list[Any]:
    """A list from `a,b[c=1,d=2]`, whose commas separate, or from a YAML list, whose items are each one."""
    if isinstance(value, str):
        return split_list(value)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def names(value: Any) -> list[str]:
    """A list of names; YAML may write digits as numbers, and one with a comma stands in double quotes on a command line."""
    return [unquoted(str(item), "name") for item in listed(value)]


def raw(value: Any) -> Any:
    """Any value; it is checked with the rest of the experiment."""
    return value


def build_parser() -> Any:
    """The parser of all commands."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter

    class Help(DefaultHelpFormatter):
        """Help as written here, with the default where it is a value and not told in words."""

        def _get_help_string(self, action: Any) -> str:
            text, value = str(action.help), action.default
            if "(default" in text or value in (None, [], False, argparse.SUPPRESS):
                return text
            return f"{text} (default: {','.join(value) if isinstance(value, list) else value})"

    parser = ArgumentParser(
        prog="bench",
        description="Honest, fast benchmarks of GAN-based image anomaly detection.",
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=Help,
    )
    parser.add_argument("--version", action="version", version=f"ganomaly-plugin {__version__}")
    commands = parser.add_subcommands(required=True, dest="command")
    for name, (add, text) in COMMANDS.items():
        described = text[0].upper() + text[1:] + "."
        command = ArgumentParser(description=described, exit_on_error=False, allow_abbrev=False, formatter_class=Help)
        add(command)
        commands.add_subcommand(name, command, help=text)
    return parser


def _add_run(parser: Any) -> None:
    parser.add_argument("--config", action="config", help="YAML file with any of these options; the command line wins")
    parser.add_argument("--models", type=listed, help="detectors: ganomaly,ae,vae[latent_dim=2]; shell patterns work")
    parser.add_argument("--datasets", type=listed, help="data sets, likewise (default: digits, by networks 16 wide)")
    parser.add_argument("--protocols", type=names, help="protocol ids (default: one-anomalous/strict-v1)")
    parser.add_argument("--classes", type=names, help="classes that take their turn (default: all)")
    parser.add_argument("--seeds", type=raw, help="3, 0-2 or 0,2,5-7 (default: 0)")
    parser.add_argument("--epochs", type=int, help="training budget (default: each model's published one)")
    parser.add_argument("--steps", type=int, help="the budget in training steps, instead of --epochs")
    parser.add_argument("--image_size", "--image-size", type=int, help="side in pixels (default: the data set's)")
    parser.add_argument("--hparams", type=raw, help="hyperparameters for every model that has them: features=16,lr=1e-4")
    parser.add_argument("--precision", type=str, help="float32, tf32 or bf16, of training; part of the job (default: float32)")
    parser.add_argument("--train_fraction", "--train-fraction", type=float, help="share of the normals to train on, (0, 1]")
    parser.add_argument("--contamination", type=float, help="share of the training images that are anomalies, [0, 0.5]")
    parser.add_argument("--on_bad_image", "--on-bad-image", type=str, help="fail or skip, for data sets that read image files")
    parser.add_argument("--trust", type=names, help="modules whose class paths a --config may name, such as my_package")
    parser.add_argument("--limit", type=int, help="only the first so many jobs")
    parser.add_argument("--out", type=str, help="results folder (default: results/CONFIG, run or quickstart)")
    parser.add_argument("--data_root", "--data-root", type=str, help="folder of data sets ($GANOMALY_DATA_ROOT, ./datasets)")
    parser.add_argument("--device", type=str, help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--trainer", type=str, help="auto, plain, compiled; stacked: seeds and classes in one; or stacked-WAY")
    parser.add_argument("--cuda_graphs", "--cuda-graphs", type=bool, default=True, help="replay steps on a GPU (default: true)")
    parser.add_argument("--stack", type=int, help="models trained together at most (default: 64, or what the memory holds)")
    parser.add_argument("--executor", type=str, help="local: in worker processes (default); inline: in this one; ray; slurm")
    parser.add_argument("--workers", type=int, help="worker processes (default: 1)")
    parser.add_argument("--devices", type=names, help="GPUs to use, such as 0,1: a worker process for each")
    parser.add_argument("--jobs_per_device", "--jobs-per-device", type=int, help="worker processes for each GPU (default: 1)")
    parser.add_argument("--timeout", type=float, help="seconds a job may take before its worker process is killed")
    parser.add_argument("--retries", type=int, help="tries more for a job whose worker process died (default: 0)")
    parser.add_argument("--cpus_per_job", "--cpus-per-job", type=float, help="processors for each job, on a cluster")
    parser.add_argument("--gpus_per_job", "--gpus-per-job", type=float, help="GPUs for each job, on a cluster; Ray: also 0.25")
    parser.add_argument("--address", type=str, help="Ray: head of the cluster, host:port or auto (default: this machine alone)")
    parser.add_argument("--partition", type=str, help="SLURM: partition")
    parser.add_argument("--time", type=str, help="SLURM: time limit of a job, in minutes, H:MM:SS or D-HH:MM")
    parser.add_argument("--memory", type=str, help="SLURM: memory of a job, such as 8G")
    parser.add_argument("--max_parallel", "--max-parallel", type=int, help="SLURM: jobs at once (default: 256)")
    parser.add_argument("--sbatch", type=str, help="SLURM: further options of sbatch, such as account=x,qos=y")
    parser.add_argument("--slurm_folder", "--slurm-folder", type=str, help="SLURM: private folder for logs, on a shared disk")
    parser.add_argument("--logger", type=names, help="training curves to tensorboard, mlflow, wandb, csv, or several")
    parser.add_argument("--fail_fast", "--fail-fast", action="store_true", help="stop at the first job that fails")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="show what would run, and stop")
    parser.add_argument("--retry_failed", "--retry-failed", action="store_true", help="run failed jobs again")


_METRICS = "auroc, auprc, f1, fpr95, eer, pixel_auroc, aupro, auroc_oracle; from records and stored scores"


def _add_tables(parser: Any) -> None:
    parser.add_argument("results", type=str, help="results folder")
    parser.add_argument("--metrics", type=names, default=["auroc", "auprc"], help=_METRICS)
    parser.add_argument("--format", type=str, default="text", help="what to print: text, md, csv, latex or json")
    parser.add_argument("--against", type=str, help="published: the literature's numbers beside ours, where protocols agree")
    parser.add_argument("--scores", "--score", type=names, help="named scores of each model side by side, or all; no training")
    parser.add_argument("--report", action="store_true", help="print classification reports at a threshold instead")
    parser.add_argument("--fpr", type=float, default=0.05, help="false-positive rate of that threshold on normal images")
    parser.add_argument("--per_class", "--per-class", action="store_true", help="a report for each class and seed")


def _add_stats(parser: Any) -> None:
    parser.add_argument("results", type=str, help="results folder")
    parser.add_argument("--metric", type=str, default="auroc", help=_METRICS)
    parser.add_argument("--baseline", type=str, help="compare every detector with this one only, as tables call it")


def _add_plot(parser: Any) -> None:
    parser.add_argument("kind", type=str, help="roc, pr, histograms, bars, losses, speed, samples, epochs, critical-difference")
    parser.add_argument("results", type=str, help="results folder")
    parser.add_argument("--out", type=str, required=True, help="file to write: .pdf, .svg or .png")
    parser.add_argument("--width", type=float, default=3.3, help="in inches (default: 3.3, one column of a two-column paper)")
    parser.add_argument("--detectors", type=names, default=[], help="only these, by name or as tables call them")
    parser.add_argument("--classes", type=names, default=[], help="only these")
    parser.add_argument("--datasets", type=names, default=[], help="only these, by name or as tables call them")
    parser.add_argument("--protocols", type=names, default=[], help="only these")


def _add_report(parser: Any) -> None:
    parser.add_argument("results", type=str, help="results folder")
    parser.add_argument("--out", type=str, help="file to write (default: report.html in the results folder)")


def _add_merge(parser: Any) -> None:
    parser.add_argument("results", nargs="+", type=str, help="results folders")
    parser.add_argument("--out", type=str, required=True, help="results folder to write; may be one of them")
    parser.add_argument("--keep", type=str, help="first or last, where folders have other scores for one job")


def _add_diff(parser: Any) -> None:
    parser.add_argument("first", type=str, help="results folder")
    parser.add_argument("second", type=str, help="results folder")


def _add_sys_info(parser: Any) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")


def _add_ls(parser: Any) -> None:
    parser.add_argument("pattern", nargs="?", type=str, help="shell pattern of names (default: all); one name: its options")


def _add_test(parser: Any) -> None:
    parser.add_argument("models", nargs="+", type=str, help="names, class paths module:Class, or shell patterns; [options]")
    parser.add_argument("--device", type=str, default="cpu", help="auto, cpu, cuda or cuda:N")


def _add_data(parser: Any) -> None:
    parser.add_argument("action", choices=["ls", "check", "get"], help="ls, check or get")
    parser.add_argument("datasets", nargs="*", type=str, help="names with [options]; ls shows all without one")
    parser.add_argument("--data_root", "--data-root", type=str, help="folder of data sets ($GANOMALY_DATA_ROOT, ./datasets)")


def _add_verify(parser: Any) -> None:
    parser.add_argument("files", nargs="+", type=str, help="recordings (.npz)")
    parser.add_argument("--trainer", type=str, default="plain", help="which trainer replays them")
    parser.add_argument("--device", type=str, default="cpu", help="auto, cpu, cuda or cuda:N")


def _add_speed(parser: Any) -> None:
    parser.add_argument("--models", type=listed, default=["ganomaly"], help="detectors: ganomaly,ae,vae[latent_dim=2]")
    parser.add_argument("--trainers", type=names, default=["plain"], help="trainers, side by side")
    parser.add_argument("--peers", type=names, help="authors, anomalib or none, beside ganomaly (default: authors)")
    parser.add_argument("--measure", type=names, default=["training", "scoring"], help="what to time: training, scoring")
    parser.add_argument("--jobs", type=int, default=1, help="models at once, for trainers that train several")
    parser.add_argument("--image_size", "--image-size", type=int, default=32, help="side in pixels")
    parser.add_argument("--channels", type=int, help="of random pixels: 1 or 3 (default: 1)")
    parser.add_argument("--features", type=int, default=64, help="width of the networks")
    parser.add_argument("--batch_size", "--batch-size", type=int, default=64, help="images in a step, of each model")
    parser.add_argument("--precision", type=str, help="float32, tf32 or bf16, of training (default: float32)")
    parser.add_argument("--images", type=int, default=1000, help="how many images to score")
    parser.add_argument("--dataset", type=str, help="images of this data set (default: random pixels)")
    parser.add_argument("--data_root", "--data-root", type=str, help="folder of data sets ($GANOMALY_DATA_ROOT, ./datasets)")
    parser.add_argument("--repeats", type=int, default=15, help="turns that count; their median is the figure")
    parser.add_argument("--device", type=str, default="cpu", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", type=str, default=None, help="also write the figures to this CSV file")


#: Every command: what adds its options, and what it does.
COMMANDS: dict[str, tuple[Callable[[Any], None], str]] = {
    "run": (_add_run, "run a sweep of models × data sets × classes × seeds and write its tables"),
    "tables": (_add_tables, "make the tables of a results folder again, from its records alone"),
    "stats": (_add_stats, "print intervals and significance tests, or why the results are too few for them"),
    "plot": (_add_plot, "draw a figure of a results folder for a paper: PDF, SVG or PNG"),
    "report": (_add_report, "make one HTML page of a results folder, to open from disk"),
    "merge": (_add_merge, "make one results folder out of several, where their rows compare"),
    "diff": (_add_diff, "say how two results folders differ, and why"),
    "ls": (_add_ls, "list detectors, data sets and protocols, or the options of one"),
    "test": (_add_test, "run the conformance suite on a detector, built in or your own"),
    "data": (_add_data, "list, check or get data sets"),
    "verify": (_add_verify, "replay a recording of the authors' GANomaly and compare every number"),
    "speed": (_add_speed, "time training and scoring beside peers, and count memory and FLOPs"),
    "sys-info": (_add_sys_info, "print versions, hardware and commit, for a bug report"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` and return its exit code.

    0: done. 1: something failed or could not be stored. 2: usage. 130: interrupted.
    """
    from jsonargparse import ArgumentError

    words = sys.argv[1:] if argv is None else list(argv)
    mend_streams()
    try:
        arguments = parse(words)
        from ganomaly_plugin import commands

        options = arguments[arguments.command]
        options.words = words  # what the user wrote, as opposed to what a config says
        return int(getattr(commands, arguments.command.replace("-", "_"))(options))
    except ArgumentError as error:
        return _stop(_readable(error, words))
    except CannotStore as error:
        return _stop(one_line(error), EXIT_FAILED)
    except BenchError as error:
        return _stop(one_line(error))
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of stdout, such as head, has gone; on stderr that is no error
        sys.stdout = None
        return EXIT_OK
    except OSError as error:  # a file or disk that fails where no command expects it
        where = f": {error.filename}" if error.filename else ""
        return _stop(f"{error.strerror or one_line(error)}{where}. Mend that and start again.", EXIT_FAILED)
    except RecursionError:
        return _stop("Input is nested too deeply. Give a flat config, and options of at most a few levels.")


def parse(words: Sequence[str]) -> Any:
    """The options that `words`, and the configs they name, set.

    Raises:
        ArgumentError: They cannot be read.
    """
    from jsonargparse import ArgumentError

    configs, others = _without_configs(words)
    try:
        for path in configs:
            _check_config(Path(path))
        # Behind the command: the parser lets the later word win, wherever a config stood.
        arguments = build_parser().parse_args([*others[:1], *(f"--config={path}" for path in configs), *others[1:]])
        if configs:
            _check_flags(arguments.command, arguments[arguments.command])
        return arguments
    except (ArgumentError, BenchError, RecursionError, OSError):
        raise
    except Exception as error:  # the parser lets through what YAML and decoders raise for a file that is no config
        raise InvalidInput(
            f"A config cannot be read: {one_line(error)[:300]}. Give YAML of the options of bench run."
        ) from error


def _without_configs(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The paths of the configs that `words` name, and the other words."""
    paths: list[str] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        option, equals, path = word.partition("=")
        value = path if equals else next(rest, None) if word == "--config" else None
        if option == "--config" and value is not None:
            paths.append(value)
        else:
            others.append(word)
    return paths, others


def _check_config(path: Path) -> None:
    """Raise InvalidInput for a config that is not there or no mapping of options; what else is wrong the parser says."""
    if not os.access(path, os.F_OK) or path.is_dir():  # as is the text of a config itself
        raise InvalidInput(f"No config file at {' '.join(str(path).split())[:300]}. Give the path of a YAML file.")
    if not path.is_file():
        return
    try:
        text = path.read_bytes().decode("utf-8-sig")
        alias = next((event.anchor for event in yaml.parse(text) if isinstance(event, yaml.AliasEvent)), None)
        content = yaml.safe_load(text) if alias is None else None
    except UnicodeDecodeError as error:
        raise InvalidInput(f"The config {path} is no text in UTF-8. Save it as such.") from error
    except (yaml.YAMLError, RecursionError, ValueError):
        return
    if alias is not None:  # a few lines of aliases can stand for more than anybody has time to read
        raise InvalidInput(f"The config {path} has the alias *{alias}. Write out what it stands for.")
    if not isinstance(content, dict) or all(value is None for value in content.values()):
        raise InvalidInput(f"The config {path} sets no option. Give YAML such as models: ganomaly.")
    if "config" in content:
        raise InvalidInput(f"The config {path} names another one. Give both on the command line: --config A --config B.")
    if isinstance(content.get("run"), dict):
        raise InvalidInput(f"The config {path} has its options below run:. Put them at the top level.")
    if isinstance(content.get("model"), dict):
        raise InvalidInput(f"The config {path} is for anomalib train. For bench run write models: anomalib:Ganomaly, say.")


def _check_flags(command: str, options: Any) -> None:
    """Raise InvalidInput for a flag that a config sets to something else than true or false, which the parser lets pass."""
    for action in _options_of(command).values():
        if action.nargs == 0 and not isinstance(options[action.dest], bool):
            raise InvalidInput(f"--{action.dest} must be true or false, got {options[action.dest]!r}.")


def _options_of(command: str) -> dict[str, Any]:
    """The options of a command, by name, as the parser has them."""
    from jsonargparse import ArgumentParser

    fresh = ArgumentParser(exit_on_error=False)
    COMMANDS[command][0](fresh)
    return {action.dest: action for action in fresh._actions if action.dest not in ("help", "print_config")}


def _stop(text: str, code: int = EXIT_USAGE) -> int:
    print(f"bench: error: {printable(text)}", file=sys.stderr)
    return code


_ELSEWHERE = "Those of a model or data set go into brackets, as ganomaly[features=16]; bench ls ganomaly shows them."


def _readable(error: Exception, words: Sequence[str]) -> str:
    """A parser error as one line, with the nearest option where a name is unknown."""
    text = " ".join(str(error).split())
    command = next((word for word in words if word in COMMANDS), None)
    match = re.search(
        r"does not accept option '([\w.-]+)'|Option '([\w.-]+)' is not accepted|Unrecognized arguments: -{1,2}([\w-]+)", text
    )
    stray = re.search(r"Unrecognized arguments: ([^-\s]\S*)", text)
    if (match or stray) and command:
        actions = _options_of(command)
        if match:
            name = next(filter(None, match.groups())).split(".")[-1].replace("-", "_")
            todo = _ELSEWHERE if command == "run" else ""
            return one_line(unknown(f"option of bench {command}", name, list(actions), todo=todo))
        if stray:
            return _of_stray(stray[1], command, words, actions)
    dashed = re.search(r'Key "(\w+)" not found in namespace', text)
    if dashed:  # what the parser makes of a config's key with a dash, which it takes for the option and does not find
        return f"A config has a key {dashed[1].replace('_', '-')!r}. Write {dashed[1]}: keys of a config have no dashes."
    wrong = re.search(r'Parser key "([\w.]+)": Expected a <class \'(\w+)\'>\. Got value: (.*)', text)
    if wrong:
        quotes = " Put it in quotes: YAML reads 1:30:00 as a number, and yes as true." if wrong[2] == "str" else ""
        return f"--{wrong[1].split('.')[-1]} must be {_TYPE_NAMES.get(wrong[2], wrong[2])}, got {wrong[3]}.{quotes}"
    missing = re.search(r"Option '\w+\.(\w+)' is required", text)
    if missing and command:
        first, *others = _options_of(command).values()
        action = next((each for each in others if each.dest == missing[1] and each.nargs != "*"), first)  # "*" may be left out
        text = f"bench {command} wants {''.join(action.option_strings[:1]) or action.dest.upper()}: {action.help}"
    return f"{text.rstrip('.')}. See bench {f'{command} ' if command else ''}--help."


def _of_stray(stray: str, command: str, words: Sequence[str], actions: dict[str, Any]) -> str:
    """What to do about a word that belongs to no option: mostly values apart by spaces, or a value that was to be quoted."""
    said = f"bench {command} cannot place {stray!r}."
    place = next((k for k, word in enumerate(words) if k and word == stray and not words[k - 1].startswith("-")), 0)
    at = next((k for k in range(place, 0, -1) if words[k].startswith("--")), None)
    if "config" in actions and stray.endswith((".yaml", ".yml")):
        return f"{said} A config stands behind --config: bench {command} --config {stray}."
    if at is None:
        return f"{said} Write options as --NAME VALUE; see bench {command} --help."
    option, _, first = words[at].partition("=")
    values = [first, *takewhile(lambda word: not word.startswith("-"), words[at + 1 :])]
    action = actions.get(option[2:].replace("-", "_"))
    if action is not None and action.type in (listed, names, raw):
        together = ",".join(value.strip(",") for value in values if value.strip(","))
        return f"{said} Put commas, and no spaces, between the values of an option: {option} {together}."
    return f"{said} {option} takes one value; quote one that has spaces: {option} '{' '.join(values).strip()}'."

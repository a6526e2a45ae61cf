"""The ``prelora`` command: train, plan, replay, export, report, figures, data."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import prelora
from prelora.errors import CheckpointError, DataError
from prelora.exits import EXIT_BAD_INPUT, EXIT_CHECKPOINT, EXIT_DATA, fail


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["train"]:
        try:
            from prelora.train.__main__ import main as train
        except ModuleNotFoundError as error:
            return _fail_without(error)
        return train(given[1:])
    parses = given[:1] in (["fork"], ["plan"], ["replay"])  # the fields of dataclasses that --help here need not import
    options = argparse.Namespace(command=given[0], given=given[1:]) if parses else _parser().parse_args(given)
    commands = {"fork": _fork, "plan": _plan, "replay": _replay, "export": _export, "report": _report}
    commands |= {"figures": _figures, "data": _data_check}
    try:
        return commands[options.command](options)
    except ModuleNotFoundError as error:
        return _fail_without(error)
    except BrokenPipeError:  # `| head` has seen enough
        return 0
    except (ValueError, OSError) as error:
        return fail(error, EXIT_BAD_INPUT)
    except CheckpointError as error:
        return fail(error, EXIT_CHECKPOINT)
    except DataError as error:
        return fail(error, EXIT_DATA)


def _fail_without(module: ModuleNotFoundError) -> int:
    if (module.name or "").startswith("prelora"):
        raise module
    return fail(
        f"{module}: pip install 'prelora[train,transformers,peft]' brings what the commands use", EXIT_BAD_INPUT
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prelora", description="Train with PreLoRA, export and report what came out.")
    parser.add_argument("--version", action="version", version=f"prelora {prelora.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("train", help="train a recipe: prelora train --help", add_help=False)
    commands.add_parser("fork", help="another run out of a full-rank run: prelora fork --help", add_help=False)
    commands.add_parser("plan", help="memory, network and time before a run: prelora plan --help", add_help=False)
    commands.add_parser("replay", help="a run's log at other settings: prelora replay --help", add_help=False)
    export = commands.add_parser(
        "export",
        help="write a run's model for the stock library",
        description="Write what a run trained for the stock timm or transformers model: the state dict with LoRA "
        "merged into the weights, or an adapter for PEFT beside its base. Either is loaded and compared first.",
    )
    export.add_argument("run", type=Path, help="the run's folder")
    export.add_argument(
        "--to",
        choices=["merged", "peft"],
        default="merged",
        help="merged: W + s·B·A in one file, no adapters (default); peft: a folder for PeftModel.from_pretrained",
    )
    export.add_argument(
        "--out", type=Path, help="the file or folder (default: RUN/export/merged.safetensors, RUN/export/peft)"
    )
    which = export.add_mutually_exclusive_group()
    which.add_argument("--checkpoint", type=Path, help="a checkpoint's folder (default: the newest intact one)")
    which.add_argument("--best", action="store_true", help="the checkpoint with the best top-1")
    export.add_argument("--ema", action="store_true", help="the weights' moving average")
    report = commands.add_parser("report", help="write a run's report, one HTML page")
    report.add_argument("run", type=Path, help="the run's folder")
    report.add_argument("--out", type=Path, help="the file (default: RUN/report.html)")
    figures = commands.add_parser(
        "figures",
        help="draw an experiment's collected results",
        description="Draw every figure and table that RESULTS/NAME/*.csv have data for, as PNG, SVG and Markdown.",
    )
    figures.add_argument("results", type=Path, help="holds a folder with runs.csv for each data set")
    figures.add_argument("--out", type=Path, help="a folder for all (default: RESULTS/NAME/figures)")
    data = commands.add_parser("data", help="look after a data set's images: prelora data check PATH")
    check = data.add_subparsers(dest="action", required=True, metavar="ACTION").add_parser(
        "check",
        help="decode every image and write down what it is",
        description="Decode every image of both splits and write a manifest (sizes, SHA-256, what does not decode), by "
        "which training knows each file again. Exits with 5 if some are bad.",
    )
    check.add_argument("path", type=Path, help="as data.path: folders, tars or TFRecords")
    check.add_argument("--out", type=Path, help="the manifest (default: PATH/prelora-manifest.json)")
    check.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="threads (default: %(default)s)")
    return parser


def _fork(options: argparse.Namespace) -> int:
    from prelora.train.display import plain_warnings
    from prelora.train.fork import main as fork

    with plain_warnings():
        print(fork(options.given))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from prelora.analysis.plan_command import main as plan

    print(plan(options.given))
    return 0


def _replay(options: argparse.Namespace) -> int:
    from prelora.analysis.replay_command import main as replay
    from prelora.train.display import plain_warnings

    with plain_warnings():
        print(replay(options.given))
    return 0


def _export(options: argparse.Namespace) -> int:
    from prelora.train.display import plain_warnings

    which = {"checkpoint": options.checkpoint, "use_best": options.best, "ema": options.ema}
    with plain_warnings():
        if options.to == "peft":
            from prelora.train.export_peft import export_peft

            path, difference, adapter = export_peft(options.run, options.out, **which)
            how = f"PEFT loads {len(adapter.ranks)} adapted layers onto base.safetensors in the stock model"
        else:
            from prelora.train.export_merged import export_merged

            path, difference = export_merged(options.run, options.out, **which)
            how = "loads strict=True into the stock model"
    print(f"{path}: {how}; its logits differ by {difference:.1e} of their scale")
    if options.to == "peft" and adapter.base_only:
        print(f"in base.safetensors alone, for PEFT has no place for them: {', '.join(adapter.base_only)}")
    return 0


def _report(options: argparse.Namespace) -> int:
    from prelora.analysis.report import write_report

    print(write_report(options.run, options.out))
    return 0


def _figures(options: argparse.Namespace) -> int:
    from prelora.analysis.results.command import write_figures

    print("\n".join(write_figures(options.results, options.out)))
    return 0


def _data_check(options: argparse.Namespace) -> int:
    from prelora.data.check import check_data

    return EXIT_DATA if check_data(options.path, options.out, options.jobs) else 0


if __name__ == "__main__":
    sys.exit(main())

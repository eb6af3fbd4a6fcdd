"""`python -m ascend_kit`: run, check, convert, work, serve, doctor, report, zip, notebooks.

Exit status: 0 done, 1 something that was run has failed or is an alarm, 2 the request itself is wrong, 130 stopped by
Ctrl-C, 143 by another signal.
"""

from __future__ import annotations

import os
import signal

# Ctrl-C while the rest is imported: nothing has begun, so there is nothing to tell.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ascend_kit.engine.ranks import environment_ranks, without_ranks
from ascend_kit.files import os_error_text
from ascend_kit.messages import phrase
from ascend_kit.params import Experiment, ParameterError, build_experiment, load_experiment
from ascend_kit.params.experiment import DEMO
from ascend_kit.params.notebook import parameters_of, write_cells
from ascend_kit.params.paths import check_paths
from ascend_kit.params.yaml_file import naming_lines, parse_overrides
from ascend_kit.run.checks import RunError
from ascend_kit.run.copies import make_working_copies
from ascend_kit.run.experiment import check_experiment, run_experiment, write_run_report
from ascend_kit.run.pack import pack
from ascend_kit.stages import RunFolderError

Command = Callable[[argparse.Namespace], int | None]  # None is the exit status 0
CONVERT_OPTIONS = ("input_model", "output_model", "framework", "device")  # parameters that `convert` has options for

EPILOG = """examples:
  python -m ascend_kit run params/demo.yaml                          all notebooks, in order
  python -m ascend_kit run params/demo.yaml --resume                 only what is missing or failed
  python -m ascend_kit run params/qwen3-8b.yaml --only 04,05 --run plain --set graph_mode=false
  python -m ascend_kit check params/qwen3-8b.yaml                    validate, run nothing
  python -m ascend_kit check --list                                  every parameter with its default
  python -m ascend_kit convert params/qwen3-8b-w8a8.yaml             convert the checkpoint without a notebook
  python -m ascend_kit work params/qwen3-8b.yaml                     notebooks to change by hand, in the run folder
  python -m ascend_kit serve demo --port 8000                        OpenAI-compatible server, not for production
  python -m ascend_kit zip outputs --to runs.zip                     reports and what they are drawn from, for mail
  python -m ascend_kit doctor                                        faults of this machine, and remedies
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = _as_one_process(sys.argv[1:] if argv is None else argv)
    if words is None:
        return 0
    if words[:1] == ["doctor"]:  # it has a command line of its own
        from ascend_kit.doctor import main as doctor

        return _guarded(lambda: doctor(words[1:]))
    arguments = _parser().parse_args(words)
    return _guarded(lambda: arguments.command(arguments))


def _as_one_process(words: list[str]) -> list[str] | None:
    """The command for rank 0 of a launcher, which uses the cards of all ranks; None for the other ranks.

    `mpirun -np 4 python -m ascend_kit run ...` starts the same notebooks four times: one of them must do the work.
    """
    ranks = environment_ranks()
    if ranks is None:
        return words
    if ranks.rank > 0:
        return None
    alone = without_ranks(os.environ)
    for name in set(os.environ) - set(alone):
        del os.environ[name]
    is_run = words[:1] == ["run"]
    print(
        f"ascend_kit: started as {ranks.size} ranks by {ranks.launcher}; rank 0 works"
        + (f" with cards={ranks.size}" if is_run else ""),
        file=sys.stderr,
    )
    return [*words, "--set", f"cards={ranks.size}"] if is_run else words


def _guarded(command: Any) -> int:
    try:
        return command() or 0
    except (ParameterError, RunError, RunFolderError) as error:
        print(f"ascend_kit: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        return 141
    except OSError as error:
        print(f"ascend_kit: error: {os_error_text(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"ascend_kit: {str(error) or 'interrupted'}", file=sys.stderr)
        return getattr(error, "status", 130)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ascend_kit",
        epilog=EPILOG,
        description="Run, check and report experiments on Qwen models.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    assigned = argparse.ArgumentParser(add_help=False)
    told = "replace one parameter (may be given several times); the value is read as YAML"
    assigned.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="assignments", help=told)
    experiment = argparse.ArgumentParser(add_help=False, parents=[assigned])
    experiment.add_argument("parameters", nargs="?", metavar="YAML", help="parameter file, such as params/demo.yaml")
    experiment.add_argument("--run", metavar="NAME", help="name of this variant, the same as --set run=NAME")
    notebooks = argparse.ArgumentParser(add_help=False, parents=[experiment])
    notebooks.add_argument("--notebooks", metavar="FOLDER", help="notebooks to run; default: those of the project")

    def command(name: str, function: Command, told: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=told, parents=parents)
        added.set_defaults(command=function)
        return added

    run = command("run", _run, "execute the notebooks of an experiment, write its report", notebooks)
    run.add_argument("--only", metavar="NAMES", help="these notebooks, separated by commas: 04_throughput,05")
    run.add_argument("--resume", action="store_true", help="the run folder exists: do what is missing or failed")
    run.add_argument("--overwrite", action="store_true", help="the run folder exists: start again")
    run.add_argument("--accept-alarms", action="store_true", help="exit status 0 although a result is an alarm")

    check = command("check", _check, "validate a parameter file, or a checkpoint folder, run nothing", experiment)
    check.add_argument("--list", action="store_true", help="print every parameter with its default and meaning")

    convert = command("convert", _convert, "convert a checkpoint as the parameter file says", experiment)
    for option in CONVERT_OPTIONS:
        spellings = dict.fromkeys((f"--{option.replace('_', '-')}", f"--{option}"))
        convert.add_argument(*spellings, dest=option, metavar="VALUE", help=f"the same as --set {option}=VALUE")
    convert.add_argument("--config", metavar="YAML", help="the parameter file, as an option")

    commands.add_parser("doctor", help="look for faults of this machine and name the remedy", add_help=False)

    command("work", _work, "make working copies of the notebooks in the run folder, for JupyterLab", notebooks)

    serve = command("serve", _serve, "OpenAI-compatible server, for trying a model; not for production", assigned)
    serve.add_argument("parameters", metavar="MODEL", help="checkpoint folder, parameter file, or `demo`")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at; default this machine only")
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one")

    cells = command("notebooks", _notebooks, "write the notebooks' parameter cells from the package's defaults")
    cells.add_argument("--notebooks", metavar="FOLDER", default="notebooks", help="their folder; default notebooks")
    cells.add_argument("--check", action="store_true", help="write nothing; exit status 1 if a cell differs")

    zipped = command("zip", _zip, "pack a folder of runs with their reports into one file, for mail")
    zipped.add_argument("folder", nargs="?", default="outputs", help="outputs (the default), an experiment or a run")
    zipped.add_argument("--to", metavar="FILE", help="the archive; default <folder's name>.zip in the current folder")
    zipped.add_argument("--no-rows", action="store_true", help="without the tables of rows, requests and documents")

    report = command("report", _report, "write report.html of a run folder again")
    report.add_argument("run_folder", help="outputs/<experiment>/<run>")
    return parser


def _overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """What --set and the options named like a parameter say; such an option's value is taken as it is."""
    options = {key: getattr(arguments, key, None) for key in ("run", *CONVERT_OPTIONS)}
    return parse_overrides(arguments.assignments) | {key: value for key, value in options.items() if value is not None}


def _parameter_file(arguments: argparse.Namespace) -> str:
    path = arguments.parameters or getattr(arguments, "config", None)
    if path is None:
        raise RunError("name a parameter file, for instance params/demo.yaml")
    return path


def _model_alone(model: str, overrides: dict[str, Any], source: str) -> Experiment:
    return build_experiment({"input_model": model, "use_model": "source", **overrides}, source=source)


def _run(arguments: argparse.Namespace) -> int:
    only = [name.strip() for name in arguments.only.split(",") if name.strip()] if arguments.only else None
    report = run_experiment(
        _parameter_file(arguments),
        only=only,
        resume=arguments.resume,
        overwrite=arguments.overwrite,
        overrides=_overrides(arguments),
        notebooks=arguments.notebooks,
        echo=_say,
    )
    return 0 if report.ok or (arguments.accept_alarms and report.state == "alarm") else 1


def _say(line: str) -> None:
    is_bad = line.strip().startswith(("ALARM", "FAILED"))
    print(f"\x1b[31m{line}\x1b[0m" if is_bad and sys.stdout.isatty() else line, flush=True)


def _check(arguments: argparse.Namespace) -> None:
    if arguments.list:
        language = _overrides(arguments).get("language", "en")
        for name, info in Experiment.model_fields.items():
            print(f"{name} = {info.default!r}  # {phrase(info.description or '', language)}")
        return
    given, overrides = _parameter_file(arguments), _overrides(arguments)
    if Path(given).is_dir():
        from ascend_kit.checkpoint.convert import check_model

        try:
            left_out = check_model(_model_alone(given, overrides, "check"))
        except (ValueError, OSError) as error:
            raise RunError(str(error)) from error
        print("\n".join([f"{given}: a model that can be run", *left_out]))
    else:
        print(f"{given}: fine; results go to {check_experiment(given, overrides).run_folder}")


def _notebooks(arguments: argparse.Namespace) -> int:
    differences = write_cells(Path(arguments.notebooks), check=arguments.check)
    for text in differences:
        print(f"{text}: {'differs from Experiment' if arguments.check else 'written'}")
    return 1 if arguments.check and differences else 0


def _convert(arguments: argparse.Namespace) -> int | None:
    from ascend_kit import convert
    from ascend_kit.checkpoint.parity import ParityError
    from ascend_kit.demo import resolve
    from ascend_kit.measure.agreement import ParityCheck
    from ascend_kit.show.progress import Progress
    from ascend_kit.show.tables import cell_text

    overrides = _overrides(arguments)
    experiment = load_experiment(_parameter_file(arguments), overrides)
    with naming_lines(_parameter_file(arguments), overrides):
        check_paths(experiment, parameters_of("02_convert"))
    experiment = resolve(experiment)
    parity = ParityCheck(experiment)
    try:
        with Progress("convert") as progress:
            result = convert(experiment, on_progress=progress, before_publish=parity)
    except ParityError as error:
        print(f"ascend_kit: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        raise RunError(str(error)) from error
    for row in parity.describe().get("figures", []):
        print(f"  {row['figure']}: {cell_text(row['value'])}" + (f" (limit {row['limit']})" if row["limit"] else ""))
    print(f"{result.folder}: {'reused, made before in the same way' if result.reused else 'scheme ' + result.scheme}")


def _serve(arguments: argparse.Namespace) -> None:
    from ascend_kit import AscendInferEngine
    from ascend_kit.demo import resolve
    from ascend_kit.serve import serve

    overrides, given = parse_overrides(arguments.assignments), arguments.parameters
    if given == DEMO or Path(given).is_dir():
        experiment = _model_alone(given, overrides, "serve")
    else:
        experiment = load_experiment(given, overrides)
    try:
        engine = AscendInferEngine.from_experiment(resolve(experiment))
    except ValueError as error:
        raise RunError(str(error)) from error
    serve(engine, experiment.model_name, arguments.host, arguments.port)


def _report(arguments: argparse.Namespace) -> None:
    print(write_run_report(Path(arguments.run_folder)))


def _zip(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.folder)
    target = Path(arguments.to or f"{folder.resolve().name}.zip")
    size = pack(folder, target, with_rows=not arguments.no_rows)
    print(f"{target}: {size / 1e6:.1f} MB")


def _work(arguments: argparse.Namespace) -> None:
    print(make_working_copies(_parameter_file(arguments), _overrides(arguments), arguments.notebooks))


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())

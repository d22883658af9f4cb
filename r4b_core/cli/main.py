"""Entry point of the `r4b` command: registers the subcommands. Also `python -m r4b_core.cli.main` under torchrun."""

from __future__ import annotations

from typing import Annotated

import typer

from r4b_core.cli import bench, convert, curate, demo, doctor, evaluate, generate, plan, report, show, train
from r4b_core.cli.errors import CommandGroup

app = typer.Typer(
    cls=CommandGroup,
    name="r4b",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Train vision-language models that decide for themselves whether to think."""


app.command("demo")(demo.demo)
app.command("train")(train.train)
app.command("generate")(generate.generate)
app.command("eval")(evaluate.evaluate)
app.add_typer(convert.app, name="convert")
app.command("report")(report.report)
app.command("show")(show.show)
app.command("plan")(plan.plan)
app.command("doctor")(doctor.doctor)
app.command("bench")(bench.bench)
app.add_typer(curate.app, name="curate")


if __name__ == "__main__":
    app(prog_name="r4b")

"""The command line of a benchmark that measures several things: one subcommand for each."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from autoprune.storage import quiet_optuna


@dataclass(frozen=True, kw_only=True)
class Subcommand:
    """What a subcommand runs, and the function that adds its options to a parser."""

    run: Callable[[argparse.Namespace], None]
    add_options: Callable[[argparse.ArgumentParser], None]


def run_subcommand(help_page: str | None, subcommands: Mapping[str, Subcommand]) -> None:
    """Parse the command line and run what it names, with Optuna's own messages turned off."""
    parser = argparse.ArgumentParser(
        description=help_page, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choices = parser.add_subparsers(required=True)
    for name, subcommand in subcommands.items():
        choice = choices.add_parser(name)
        subcommand.add_options(choice)
        choice.set_defaults(run=subcommand.run)
    args = parser.parse_args()
    with quiet_optuna():
        args.run(args)

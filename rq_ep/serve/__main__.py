"""Serve a model: `torchrun --nproc-per-node R -m rq_ep.serve --model DIR`, or under any launcher like torchrun."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from rq_ep.config import Environment, FlagParser, ServeConfig, add_flags, read_settings
from rq_ep.core.errors import UserError
from rq_ep.model.model_names import check_is_there
from rq_ep.serve.process import exit_quickly, importing, print_user_error, set_up_logging
from rq_ep.serve.rank.early_end import EarlyEnd
from rq_ep.serve.supervisor.http_parent import HttpProcess
from rq_ep.serve.supervisor.rank_start import HubAddress
from rq_ep.serve.supervisor.supervisor import Supervisor


def main(
    argv: Sequence[str] | None = None,
    on_serving: Callable[[HubAddress], None] = lambda hub: None,
    joined: HubAddress | None = None,
) -> int:
    """Serve until asked to stop. Every rank calls this; returns its exit status.

    Args:
        argv: the command line without the program's name.
        on_serving: called where the group goes on without ranks that fail, once this one serves.
        joined: what `on_serving` was called with in a group that goes on without this rank, which joins it again.
    """
    parser = FlagParser(
        prog="python -m rq_ep.serve",
        description=__doc__,
        epilog="example: torchrun --nproc-per-node 8 -m rq_ep.serve --model MODEL --placement placement.json",
    )
    add_flags(parser, ServeConfig)
    parser.add_argument("--dry-run", action="store_true", help="print settings, placement and bytes per rank; exit")
    # The deepspeed launcher passes it; the environment says it as well.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    is_first_of_node = True
    try:
        environment = Environment.from_os()
        rank, is_first_of_node = environment.rank, environment.local_rank == 0
        args = parser.parse_args(argv)
        given = read_settings(ServeConfig, args).restarted(environment.restart_count)
        config = given.for_ranks(environment.world_size)
        _check_files(config)
        if args.dry_run or config.on_rank_failure == "stop":  # else the rank's own process checks them
            from rq_ep.serve.check_settings import check_settings  # with NumPy, which a supervisor does without

            check_settings(config, environment.world_size)
        if args.dry_run:
            from rq_ep.serve.rank.dry_run import preview

            if rank == 0:
                print(preview(given, environment.world_size, environment.local_world_size))
            return 0
        set_up_logging(config.log_level if rank == 0 else "warning")
        if config.on_rank_failure == "continue":
            return Supervisor(config, environment, on_serving=on_serving, joined=joined).run()
        return _serve_unsupervised(config, environment)
    except UserError as error:
        return print_user_error(error, is_first_of_node)


def _serve_unsupervised(config: ServeConfig, environment: Environment) -> int:
    """Serve as a rank without a supervisor, whose failure ends the group; returns the exit status."""
    # The port is bound before anything slow: a clash shows at once, and /health answers while the model loads.
    http, problem = None, None
    early_end = EarlyEnd(environment.rank)
    with early_end.watching(environment.has_launcher):
        if environment.rank == 0:
            try:
                http = HttpProcess(config, environment)
                early_end.client = http.client
            except UserError as error:
                if environment.is_one_node:  # its launcher ends the other ranks
                    raise
                problem = str(error)  # raised once the ranks have met, on all of them
        try:
            with importing():
                from rq_ep.serve.rank.rank_server import serve

            return serve(config, None if http is None else http.hub, problem, early_end)
        finally:
            if http is not None:
                http.close()


def _check_files(config: ServeConfig) -> None:
    """Raise a `UserError` for files that are not here."""
    check_is_there(config.model)
    for flag, path in (("--placement", config.placement), ("--stats", config.stats)):
        if path is not None and not Path(path).exists():
            raise UserError(f"{flag} {path}: no such file")
    for flag, path in (("--experts", config.experts), ("--record-dir", config.record_dir)):
        if path is not None and not Path(path).is_dir():
            raise UserError(f"{flag} {path}: no such directory")


if __name__ == "__main__":
    exit_quickly(main())

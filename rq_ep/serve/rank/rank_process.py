"""The process of a rank that a supervisor has started."""

from rq_ep.config import Environment
from rq_ep.core.errors import UserError
from rq_ep.serve.check_settings import check_settings
from rq_ep.serve.control import ControlClient
from rq_ep.serve.process import exit_quickly, importing, print_user_error, set_up_logging
from rq_ep.serve.rank.early_end import EarlyEnd
from rq_ep.serve.rank.supervisor_link import SupervisorLink
from rq_ep.serve.supervisor.rank_start import Ending


def main() -> int:
    """Serve as the supervisor says. Returns the exit status."""
    link = SupervisorLink.of_stdin()
    start = link.read_start()
    environment = Environment.from_os()
    rank = environment.rank
    set_up_logging(start.config.log_level if rank == 0 else "warning")
    early_end = EarlyEnd(rank, link)
    with early_end.watching(has_launcher=False):
        if start.hub is not None:  # at once, so that the HTTP process learns how the rank ends
            early_end.client = ControlClient(start.hub.address, rank, start.hub.token)
        try:
            if start.rejoin is None:
                check_settings(start.config, environment.world_size)
            with importing():
                from rq_ep.serve.rank.rank_server import serve

            status = serve(start.config, start.hub, start.problem, early_end, start.rejoin)
        except UserError as error:
            early_end.signals.is_ending = True  # the launcher sends one once another rank has ended by the same error
            if early_end.client is not None:
                early_end.client.close()
            prints = environment.local_rank == 0 or start.rejoin is not None
            status = print_user_error(error, prints, lambda: early_end.signals.are_received)
        link.report(Ending())
        return status


if __name__ == "__main__":
    exit_quickly(main())

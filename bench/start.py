"""How every bench starts from a shell: a user's mistake is one line and exit code 2."""

import sys
from collections.abc import Callable

from rq_ep.core.errors import UserError


def start(main: Callable[[], object], name: str) -> None:
    """Run `main` and exit.

    Args:
        main: the bench; what it returns is the exit code, None for success.
        name: of the bench, for the message.
    """
    try:
        code = main()
    except UserError as error:
        print(f"bench/{name}.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(code)

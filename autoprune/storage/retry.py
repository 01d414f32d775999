"""How long a run waits for a database or an object store that is away, by tenacity."""

from __future__ import annotations

import logging
from collections.abc import Callable

import tenacity

MAX_WAIT_S = 900  # how long a run waits for its storage; a guess at a database's maintenance
RESUME_HINT = "the same command with --resume goes on from the last finished trial"
INSTALL_HINT = "pip install 'psycopg[binary]' boto3"  # the extra `cluster`; autoprune is on no index

log = logging.getLogger("autoprune")


def retrying(service: str, is_away: Callable[[BaseException], bool]) -> tenacity.Retrying:
    """Return a caller that repeats an operation while a service is away, less and less often.

    Args:
        service: the name of the service in the warning that the first failure logs.
        is_away: whether an exception means that the service is away; any other exception is raised at once.
    """

    def warn(state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            reason = str(state.outcome.exception()).splitlines() or ["no answer"]
            log.warning("%s is away (%s): waiting up to %d s", service, reason[0][:200], MAX_WAIT_S)

    return tenacity.Retrying(
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=10),
        stop=tenacity.stop_after_delay(MAX_WAIT_S), retry=tenacity.retry_if_exception(is_away),
        before_sleep=warn, reraise=True,
    )  # fmt: skip

"""How the commands end: their exit codes, one meaning each, and the one line that says why."""

import sys

EXIT_OTHER_RANK, EXIT_BAD_INPUT, EXIT_NOT_FINITE, EXIT_CHECKPOINT, EXIT_DATA, EXIT_STOPPED = 1, 2, 3, 4, 5, 75
EXIT_CODES = (
    "Exit codes: 0 finished; 1 another rank failed, or an error that is none of these; 2 bad input; "
    "3 the loss was not finite; 4 a checkpoint or the run's folder could not be written or read; "
    "5 more images cannot be used than may be left out, or data check found some; "
    "75 stopped by SIGTERM or SIGINT after writing a checkpoint (run again with --resume auto to go on)."
)


def fail(error: object, code: int) -> int:
    """Say ``error`` on stderr; returns ``code``."""
    print(f"prelora: error: {error}", file=sys.stderr, flush=True)
    return code

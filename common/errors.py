"""The errors that become one line for the person at the keyboard, and the exit codes of a training run.
A reader may skip this file.
"""

import signal


class UsageError(ValueError):
    """A flag cannot be obeyed. The message is one line that says what to do instead."""


class DataError(ValueError):
    """The person's data holds a mistake. The message is one line: what is wrong, where, what to do."""


class ModelError(ValueError):
    """A model cannot be built, read or used as asked. The message is one line: what is wrong, what to do."""


class RunError(RuntimeError):
    """A run cannot go on, and neither flags nor data are to blame. The exit code is 1."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. Whatever handles Ctrl-C handles this signal too."""


# 75 is EX_TEMPFAIL of sysexits.h, "try again". A shell reports 128 + n for a process that signal n ended.
TIME_IS_UP, INTERRUPTED, TERMINATED = 75, 128 + signal.SIGINT, 128 + signal.SIGTERM
EXIT_CODES = """exit codes:
  0    finished
  1    the run cannot go on: a full disk, numbers that are not finite, too little memory
  2    a mistake in the flags or the data
  75   stopped by --max_minutes   \\
  130  stopped by Ctrl-C           } a checkpoint is saved and the command that goes on is printed;
  143  stopped by SIGTERM, SIGHUP /  a second Ctrl-C or SIGTERM stops at once and saves nothing
(torchrun itself exits with 1 where a process of it did not exit with 0.)"""

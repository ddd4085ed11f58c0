"""The one exception that means: the user can mend this."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """Something the user typed or owns is wrong.

    The message says what was wrong, where, and what to do about it. `train_network.py` prints it
    without a traceback and exits with status 2; nothing has been written or lost when it is raised.

    `problems` are its parts where it lists several.
    """

    def __init__(self, message: str, problems: Iterable[str] = ()) -> None:
        super().__init__(message)
        self.problems = list(problems) or [message]

    @classmethod
    def listing(cls, problems: Iterable[str]) -> UserError:
        """One error for several problems, each on a line of its own."""
        lines = list(problems)
        if len(lines) == 1:
            return cls(lines[0])
        listed = "\n".join([f"{len(lines)} problems:", *(f"  - {line}" for line in lines)])
        return cls(listed, lines)

"""The two errors that a user can meet. Both print as one line."""


class InputError(ValueError):
    """Something that the caller supplied is wrong.

    Args:
        where: the path of the wrong thing: a file, a dotted key, a tensor name, or several of them joined by ": ".
        expected: what would have been right.
        found: what was there.
        remedy: what to do about it.
    """

    def __init__(self, where: str, expected: str, found: object, remedy: str) -> None:
        self.where, self.expected, self.found, self.remedy = where, expected, found, remedy
        super().__init__(f"{where}: expected {expected}, found {found}; {remedy}")

    def within(self, outer: str) -> "InputError":
        """The same error, seen from further out: `outer` is put before its path."""
        return InputError(f"{outer}: {self.where}", self.expected, self.found, self.remedy)


class EngineError(RuntimeError):
    """An engine is missing, refused a net, or died. The message says which engine and what to do."""

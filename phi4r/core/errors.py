"""The errors that are the user's to mend. Everything else that goes wrong is ours and shows a traceback."""


class UserError(Exception):
    """Bad input: the command line prints `phi4r: error: <message>` on one line and exits with code 2.

    The message says what is wrong, where (file, line, key) and what was expected.
    """


class ConfigError(UserError):
    """A setting that is wrong in itself or does not go with another.

    `key` is the dotted key (`optimizer.lr`), `reason` says what was expected and what was found, `source`
    says who set the key (`tiny.toml, line 12`; the command line); the loader fills `source` in, code that
    builds a section by hand leaves it empty.
    """

    def __init__(self, key: str, reason: str, source: str = "") -> None:
        self.key = key
        self.reason = reason
        self.source = source
        super().__init__(f"{key}: {reason}" + (f" ({source})" if source else ""))

"""Functions that stand behind a command in test_cli."""


def crash() -> None:
    """A bug of ours."""
    print(1 / 0)


def interrupt() -> None:
    """Ctrl-C."""
    raise KeyboardInterrupt


def speak() -> None:
    """Output that stays in the buffer until the end."""
    print("hello")

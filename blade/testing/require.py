"""The one way a kit complains; unlike an `assert` statement it survives ``python -O``."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)

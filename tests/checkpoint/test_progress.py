import io

from blade.checkpoint.progress import console_progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_at_start_and_end() -> None:
    out = io.StringIO()
    with console_progress(out) as progress:
        for done in range(0, 101, 5):
            progress("Fetching", done * 1_000_000, 100_000_000)
    assert out.getvalue().splitlines() == ["Fetching: 0 of 100 MB", "Fetching: 100 of 100 MB"]


def test_bars_on_a_terminal() -> None:
    out = Terminal()
    with console_progress(out) as progress:
        progress("Fetching", 0, 0)
        progress("Fetching", 100, 100)
        progress("Joining", 50, 100)
    assert "Fetching" in out.getvalue()
    assert "Joining" in out.getvalue()

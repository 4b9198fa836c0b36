"""Numbers as people read them, in the terminal and on the page alike."""

from dqtk.explain import human

DASH = "\N{EN DASH}"  # where there is no number
MINUS = "\N{MINUS SIGN}"  # a line does not break after it, as it does after a hyphen
TIMES = "\N{MULTIPLICATION SIGN}"


def number_text(value: float, digits: int, sign: str = "") -> str:
    """Fixed digits with a real minus sign, none before zeros; ``sign="+"`` shows a plus too."""
    return f"{value:{sign}z.{digits}f}".replace("-", MINUS)


def range_text(low: float | None, high: float | None, digits: int, sign: str = "") -> str:
    """ "30.10 to 32.30", or why there is no interval."""
    if low is None or high is None:
        return "one prompt only"
    return f"{number_text(low, digits, sign)} to {number_text(high, digits, sign)}"


def bytes_text(num_bytes: float | None) -> str:
    """1500 -> "1.50 kB"; ``None`` -> a dash."""
    return DASH if num_bytes is None else human(num_bytes)


def ratio_text(before: float | None, after: float | None) -> str:
    """After as a multiple of before, two digits; a dash where either is unknown or ``before`` is 0."""
    return f"{after / before:.2f}{TIMES}" if before and after is not None else DASH

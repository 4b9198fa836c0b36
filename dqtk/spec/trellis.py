"""The choice of a bit-shift trellis; ``numerics/trellis.py`` is the maths."""

from .frozen import frozen


@frozen
class Trellis:
    """Codes of ``bits`` K per number (1 to 4), each number a function of the last ``state_bits`` L of them, without a codebook.

    state_bits: up to 16 and at least those of a step; 12 are quick to search, 16 lose least. vector: numbers V per step, 1 or 2;
    2 halve the search at the same number of states.
    """

    state_bits: int = 12
    bits: int = 2
    vector: int = 1

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 3, 4) or self.vector not in (1, 2):
            raise ValueError(
                f"Trellis: (bits, vector) must be 1 to 4 and 1 or 2, got ({self.bits!r}, {self.vector!r}). Use Trellis(bits=2)."
            )
        if not (isinstance(self.state_bits, int) and max(2, self.step_bits) <= self.state_bits <= 16):
            raise ValueError(
                f"Trellis: state_bits must be an integer from {max(2, self.step_bits)} to 16, got {self.state_bits!r}. "
                "The usual numbers are 12 and 16."
            )

    @property
    def step_bits(self) -> int:
        """K V, the bits of a step."""
        return self.bits * self.vector

    @property
    def states(self) -> int:
        """S = 2^L."""
        return 1 << self.state_bits

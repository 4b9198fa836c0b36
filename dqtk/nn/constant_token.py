"""A token that is the same for every prompt, taken out of an input before it is rounded and put back behind the product.

x = c token + z for every row of the input: c is 1 where the row is the token, its factor where the row is a multiple (as a prompt's
weighting makes it), and 0 where it is another. A linear is then c W token + W z, whatever the row was; W token is stored, from
the exact weight, and only z is rounded. So it does not matter where in a batch or in a long prompt the token stands, and a row that
is not the token (zeros of an empty prompt, another encoder's token) is never replaced by it.
"""

import torch
from torch import Tensor

LIKE = 0.75  # of a row's energy that must lie along the token
ONE = 2.0**-6  # so close to 1, what differs is how the encoder rounded


def multiples(x: Tensor, token: Tensor) -> Tensor:
    """float32 [..., 1]: how often ``token`` [K] is in every row of ``x`` [..., K]; 0 in rows that are not like it."""
    with torch.no_grad():
        rows, reference = x.float(), token.float()
        along, own = rows @ reference, reference.square().sum()
        like = (along > 0) & (along.square() >= LIKE * own * rows.square().sum(-1)) & (own > 0)
        times = along / own
        times = torch.where((times - 1).abs() < ONE, torch.ones_like(times), times)
        return torch.where(like, times, torch.zeros_like(times))[..., None]


def without(x: Tensor, token: Tensor, times: Tensor) -> Tensor:
    """``x`` [..., K] less ``times`` [..., 1] the token, in its dtype."""
    return (x.float() - times * token.float()).to(x.dtype)

"""One graph, forward and backward: eager results, no breaks."""

import torch


class Typed(torch.nn.Module):
    """Reads ``weight.dtype`` in the graph, as T5's feed-forward does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.to(self.inner.first.weight.dtype))


def test_full_graph(small):
    for kinds in (("w8a8", "w4a8", "w8a8-static"), ("w4", "wfp8", "w8")):
        model = Typed(small(*kinds))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for size in (2, 3):  # the second call compiles for any batch size
            x = torch.randn(size, 16, 16, generator=torch.Generator().manual_seed(size))
            a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, expected = compiled(a), model(b)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            y.square().sum().backward()
            expected.square().sum().backward()
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)

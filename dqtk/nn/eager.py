"""What stays out of compiled graphs: hooks that read a call's time on the host."""

import torch


def outside_graphs(kind: type, name: str) -> None:
    """Keep a method of a class out of every compiled graph. Called when an object of it is made, not where it is defined: a
    decorator would import the whole compiler with dqtk."""
    method = getattr(kind, name)
    if not hasattr(method, "_torchdynamo_disable"):
        setattr(kind, name, torch.compiler.disable(method))

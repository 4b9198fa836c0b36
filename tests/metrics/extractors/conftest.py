"""What the extractors' tests share: a byte-level CLIP tokenizer of no merges, and a batch of oblong noise."""

import pytest
import torch


@pytest.fixture(scope="session")
def byte_tokenizer():
    """A transformers CLIPTokenizer in which every letter is a token; 512 byte pieces, BOS, EOS."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [f"{letter}</w>" for letter in alphabet] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], pad_token="!", model_max_length=16)


@pytest.fixture(scope="session")
def images():
    return torch.randint(0, 256, (3, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))

"""A small BERT of the transformers library with random weights and ragged padding (pip install 'attnopt[hf]').

    attnopt optimize examples/bert_hf.py

A folder that ``save_pretrained`` wrote needs no Python file at all: ``attnopt optimize path/to/folder``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import BertConfig, BertModel

VOCABULARY = 1000


def model() -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=VOCABULARY, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256, attn_implementation="eager")
    return BertModel(config).eval()


def example_inputs() -> dict[str, Tensor]:
    lengths = torch.tensor([128, 90, 41])
    attention_mask = (torch.arange(128) < lengths[:, None]).to(torch.int64)
    return {"input_ids": torch.randint(0, VOCABULARY, (3, 128), generator=torch.Generator().manual_seed(0)), "attention_mask": attention_mask}

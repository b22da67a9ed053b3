"""How the tiny model is made: a tokenizer, and a Llama of a million random weights.

For texts `pretrain.py` trains it, and data/tiny holds the result. For images see
`models/images.py`. Departure from the paper: it stands in place of a pretrained model of 3 to 7
billion parameters.
"""
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).parents[1] / "data" / "tiny"     # made by `pretrain.py`

# A word, a digit or some punctuation, each with the space or line break before it; other white
# space
PIECES = r"\s?\p{L}+|\s?\d|\s?[^\s\p{L}\d]+|\s+(?!\S)|\s"


def make_tokenizer(texts, vocab_size=2048):
    """A byte-level BPE fitted on `texts`. A frequent word is one token; a rare word is several, at
    worst its bytes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<pad>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>",
                                   clean_up_tokenization_spaces=False)


def make_model(tokenizer, width=128, layers=4, heads=4, context=4096, seed=0, bias=False):
    """A small Llama (about 1M parameters) with random weights. bias: of queries and keys, for
    `images.write_copy_heads`."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=context,
            attention_bias=bias,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()

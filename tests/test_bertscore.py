"""Claim: `evals/bertscore.py` is the package bert-score, on small encoders with random weights, and
its own definition."""

import pytest
import torch
from conftest import sharpen
from test_metrics import BY_HAND, PAIRS
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    BertTokenizer,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
)

from evals import bertscore

# tokens: PAIRS holds longer texts
LIMIT = 24
SHORT = [(p[:400], r[:400]) for p, r in PAIRS]


@pytest.fixture(scope="module")
def roberta(tmp_path_factory):
    """A folder with byte-level BPE, 3 layers of width 32, and positions for LIMIT tokens."""
    folder = tmp_path_factory.mktemp("roberta")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [t for pair in PAIRS for t in pair],
        vocab_size=500,
        show_progress=False,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    )
    bpe.save_model(str(folder))
    # add_prefix_space in the file: on transformers 5 bert-score cannot ask for it (note 5 of
    # bertscore.py)
    tok = RobertaTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=LIMIT,
        add_prefix_space=True,
    )
    tok.save_pretrained(folder)
    torch.manual_seed(0)
    sharpen(
        RobertaModel(
            RobertaConfig(
                vocab_size=len(tok),
                hidden_size=32,
                num_hidden_layers=3,
                num_attention_heads=4,
                intermediate_size=64,
                max_position_embeddings=LIMIT + 2,
                pad_token_id=1,
                bos_token_id=0,
                eos_token_id=2,
                type_vocab_size=1,
            )
        ),
        4,
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """WordPiece and absolute positions from 0, 2 layers."""
    folder = tmp_path_factory.mktemp("bert")
    pieces = [
        "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.,:{}", "the",
        "cat", "water"]
    (folder / "vocab.txt").write_text("\n".join(pieces + ["##" + p for p in pieces[5:31]]))
    tok = BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=LIMIT)
    tok.save_pretrained(folder)
    torch.manual_seed(0)
    sharpen(
        BertModel(
            BertConfig(
                vocab_size=len(tok),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                max_position_embeddings=LIMIT,
            )
        ),
        4,
    ).save_pretrained(folder)
    return str(folder)


def theirs(package, pairs, folder, layer, batch):
    return torch.stack(
        package.score(
            [p for p, _ in pairs],
            [r for _, r in pairs],
            model_type=folder,
            num_layers=layer,
            batch_size=batch,
            device="cpu",
        ),
        1,
    )


def ours(pairs, folder, layer, **options):
    return torch.tensor(
        bertscore.bertscore([p for p, _ in pairs], [r for _, r in pairs], folder, layer, **options)
    )


def by_definition(p, r, folder, layer):
    """(P, R, F), cosine by cosine, from the hidden states of the whole encoder; one text, no
    batch."""
    tok, model = bertscore.load(folder, layer)[1], AutoModel.from_pretrained(folder)
    sides = []
    for text in (p, r):
        ids = tok.encode(text.strip(), truncation=True, max_length=LIMIT)
        hidden = (
            model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0].detach()
        )
        sides.append(
            [(n not in (tok.cls_token_id, tok.sep_token_id), h) for n, h in zip(ids, hidden)]
        )
    cosine = lambda a, b: (a @ b / a.norm() / b.norm()).item()
    best = [
        [max(cosine(h, g) for _, g in there) for counts, h in here if counts]
        for here, there in (sides, sides[::-1])
    ]
    P, R = (sum(side) / len(side) for side in best)
    return P, R, 2 * P * R / (P + R)


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_it_is_bert_scores(roberta, layer, monkeypatch):
    package = pytest.importorskip("bert_score")
    # bert-score 0.3.13 asks for this on an empty text, and transformers 5 has dropped it
    monkeypatch.setattr(
        RobertaTokenizer,
        "build_inputs_with_special_tokens",
        lambda self, ids: [0, *ids, 2],
        raising=False,
    )
    assert (
        ours(BY_HAND, roberta, layer) - theirs(package, BY_HAND, roberta, layer, 1)
    ).abs().max() < 1e-6
    if layer == 2:
        assert (
            ours(SHORT, roberta, layer) - theirs(package, SHORT, roberta, layer, 64)
        ).abs().max() < 1e-6


def test_it_is_bert_scores_on_wordpiece(bert):
    package = pytest.importorskip("bert_score")
    pairs = [(p, r) for p, r in SHORT[:120] if p.strip() and r.strip()]
    assert (ours(pairs, bert, 1) - theirs(package, pairs, bert, 1, 1)).abs().max() < 1e-6


def test_it_is_its_definition(roberta, bert):
    pairs = [
        ("the cat sat", "the cat is on the mat"), ("water " * 60, "ice water"),
        ("Übung 水", "ubung")]
    for folder, layer in ((roberta, 1), (roberta, 3), (bert, 1)):
        expected = torch.tensor([by_definition(p, r, folder, layer) for p, r in pairs])
        assert (ours(pairs, folder, layer) - expected).abs().max() < 1e-5
        assert expected.min() < .99


def test_batches_order_and_repeats_change_nothing(roberta):
    pairs = SHORT[:60] + SHORT[:10]
    one = torch.cat([ours([pair], roberta, 2) for pair in pairs])
    assert (ours(pairs, roberta, 2, batch=7) - one).abs().max() < 1e-5
    swapped = ours([(r, p) for p, r in pairs], roberta, 2)
    # P and R change places
    assert (swapped[:, [1, 0, 2]] - one).abs().max() < 1e-5


def test_an_empty_text_scores_0(roberta):
    assert bertscore.bertscore(["", " \n", "a"], ["a", "", ""], roberta, 2) == [(0, 0, 0)] * 3


def test_white_space_around_a_text_does_not_count(roberta):
    assert bertscore.bertscore(["  the cat\n"], ["the cat"], roberta, 2)[0] == pytest.approx(
        (1, 1, 1), abs=1e-6
    )


def test_texts_that_differ_behind_the_cut_are_equal(roberta):
    long = "water " * 100
    assert bertscore.bertscore([long + "ice"], [long + "stove"], roberta, 2)[0] == pytest.approx(
        (1, 1, 1), abs=1e-6
    )


def test_only_texts_beyond_the_limit_count_as_cut(roberta):
    _, tok, _ = bertscore.load(roberta, 2)
    long = "water " * 100
    tokens = len(bertscore.encode(tok, long, 999)) - 2
    fits = " ".join(["water"] * ((LIMIT - 2) * 100 // tokens))
    assert len(bertscore.encode(tok, long, LIMIT)) == LIMIT
    assert bertscore.cut([long, fits, "", fits + " water"], roberta, 2) == 2


def test_encoder_positions_limit_the_tokens(roberta, bert, tmp_path):
    # RoBERTa's positions begin at 2
    for folder in (roberta, bert):
        model, tok, limit = bertscore.load(folder, 1)
        tok.model_max_length = 10**30
        model.save_pretrained(tmp_path)
        tok.save_pretrained(tmp_path)
        assert limit == LIMIT and bertscore.load.__wrapped__(str(tmp_path), 1)[2] == LIMIT
        bertscore.load.cache_clear()


def test_texts_are_encoded_with_a_leading_space(roberta, tmp_path):
    tok = RobertaTokenizer.from_pretrained(roberta, add_prefix_space=False)
    assert tok.encode("the cat") != tok.encode(" the cat")
    tok.save_pretrained(tmp_path)
    AutoModel.from_pretrained(roberta).save_pretrained(tmp_path)
    assert torch.equal(ours(SHORT[:40], roberta, 2), ours(SHORT[:40], str(tmp_path), 2))


def test_layers_are_the_packages_unless_named(roberta):
    assert bertscore.layer_of("roberta-large") == 17 and bertscore.layer_of("roberta-large", 9) == 9
    assert len(bertscore.load(roberta, 2)[0].encoder.layer) == 2


def test_unknown_layers_and_unequal_lists_are_refused(roberta):
    for bad in (dict(layer=None), dict(layer=4), dict(layer=-1), dict(layer=2, rescale=True)):
        with pytest.raises(ValueError, match="layer"):
            bertscore.bertscore(["a"], ["a"], roberta, **bad)
    with pytest.raises(ValueError):
        bertscore.bertscore(["a", "b"], ["a"], roberta, 2)


def test_rescaling_is_the_packages(roberta, monkeypatch):
    raw = bertscore.bertscore(["the cat", ""], ["cat", "a"], roberta, 2)
    monkeypatch.setitem(bertscore.LAYERS, roberta, 2)
    rescaled = bertscore.bertscore(["the cat", ""], ["cat", "a"], roberta, rescale=True)
    assert rescaled[0] == pytest.approx(
        [(s - b) / (1 - b) for s, b in zip(raw[0], (0.83150584, 0.8314941, 0.83122575))]
    )
    # as bert-score does
    assert rescaled[1][2] == pytest.approx(-.83122575 / (1 - .83122575))

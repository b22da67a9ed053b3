"""Claims of `tiny.py`: how texts fall to pieces, what a seed and a folder hold, what is shipped,
what images start from."""
import random

import pytest
import torch
from conftest import naive, weights

from envs import images, physics, tools, web
from models import images as image_models
from models import pretrained, tiny
from models.text import decode, encode

# --- the tokenizer --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def frequent():
    """A tokenizer for which every piece of a word or more is frequent."""
    return tiny.make_tokenizer(["\nred-lamp: 30 left, 127\n{\"on\": true} lamp-lamp\nlamp"] * 50,
                               vocab_size=400)


def pieces(tok, text):
    return [tok.decode([i]) for i in encode(tok, text)]


def test_a_digit_is_a_token_of_its_own(frequent):
    assert pieces(frequent, "\nred-lamp: 127 30") == ["\nred", "-", "lamp", ":", " 1", "2", "7",
                                                      " 3", "0"]


def test_punctuation_is_apart_from_words(frequent):
    assert pieces(frequent, '{"on": true}') == ['{"', "on", '":', " true", "}"]


def test_words_come_with_the_white_space_before_them(frequent):
    assert pieces(frequent, " lamp\nlamp lamp") == [" lamp", "\nlamp", " lamp"]
    assert pieces(frequent, "\nred  lamp \n\nred") == ["\nred", " ", " lamp", " ", "\n", "\nred"]


@pytest.mark.parametrize("text", ["", " ", "a  b \n\n c\t", "É-ß 中12", "\u2028x\x00",
                                  "3.14 <eos> -> [x]"])
def test_every_text_comes_back_as_it_was(frequent, text):
    assert decode(frequent, encode(frequent, text)) == text


# --- the model ------------------------------------------------------------------------------------

def test_a_tiny_model_is_a_function_of_its_seed(tok):
    make = lambda seed: weights(tiny.make_model(tok, width=32, layers=2, seed=seed))
    assert torch.equal(make(3), make(3)) and not torch.equal(make(3), make(4))


@pytest.mark.parametrize("bias", [False, True])
def test_a_saved_tiny_model_gives_the_same_numbers(tok, tmp_path, bias):
    """Its biases of queries and keys, if it has them, are saved as well."""
    model = tiny.make_model(tok, width=32, layers=2, seed=5, bias=bias)
    with torch.no_grad():
        for layer in model.model.layers if bias else []:
            layer.self_attn.q_proj.bias.normal_(0, 3)
            layer.self_attn.k_proj.bias.normal_(0, 3)
    pretrained.save(model, tok, tmp_path)
    prefix, row = list(range(5, 25)), list(range(5, 15))
    a, b = (naive(m, prefix, row) for m in (model, pretrained.load(str(tmp_path))[0]))
    assert torch.allclose(a, b, atol=1e-5)
    assert (model.model.layers[0].self_attn.q_proj.bias is not None) == bias


def test_the_shipped_model_is_one_that_this_code_makes():
    """Its shapes and its context, whatever its weights."""
    model, tok = pretrained.load(tiny.FOLDER)
    made = tiny.make_model(tok)
    one, two = ({name: p.shape for name, p in m.named_parameters()} for m in (model, made))
    assert one == two and pretrained.context(model) == pretrained.context(made)
    assert 1.0e6 < model.num_parameters() < 1.3e6
    assert all(p.isfinite().all() for p in model.parameters())
    assert tok.eos_token_id == model.config.eos_token_id and tok.chat_template is None


def test_shipped_tokenizer_round_trips_every_world():
    _, tok = pretrained.load(tiny.FOLDER)
    for world in (physics, tools, web):
        for x, z, y in world.episode(random.Random(0)):
            for text in ("\n" + x, " " + z, "\n" + y):
                assert decode(tok, encode(tok, text)) == text


def test_for_images_p_copies_and_q_does_not():
    """Both know the codes and the places; P alone has heads that look at x."""
    shown = [images.spell([[str(4 * i + j) for j in range(4)] for i in range(4)])]
    added = images.vocabulary(shown, 16)
    tok = tiny.make_tokenizer([" move it\n- \n+ \nnext:\naction:"] * 20, vocab_size=300)
    P, Q, again = image_models.start(tok, added, shown, None, seed=0)
    assert again is tok and set(added) <= set(tok.get_added_vocab())
    assert P.config.vocab_size == len(tok)
    biases = [model.model.layers[0].self_attn.k_proj.bias.abs().max() for model in (P, Q)]
    assert biases[0] > 1 and biases[1] == 0
    codes = tok.convert_tokens_to_ids(["<c0>", "<c15>"])
    assert all(model.model.embed_tokens.weight[codes].norm(dim=1).min() > 0.5 for model in (P, Q))

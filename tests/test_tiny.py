"""Claims of `tiny.py`: its induction head does what it says, and a seed and a folder hold the whole model."""
import torch

import lm
import pretrained
import tiny
from conftest import naive, weights


def test_a_saved_tiny_model_keeps_its_induction_head(tok, tmp_path):
    """The head lives in the biases of q and k: a folder that lost them would give other numbers."""
    model = tiny.make_model(tok, seed=5)
    pretrained.save(model, tok, tmp_path)
    prefix, row = list(range(5, 25)) + list(range(40, 45)), list(range(5, 15))
    a, b = (naive(m, prefix, row) for m in (model, pretrained.load(str(tmp_path))[0]))
    assert torch.allclose(a, b, atol=1e-5) and model.model.layers[0].self_attn.k_proj.bias.abs().max() > 1


def test_the_first_head_looks_at_the_token_before(tok):
    model = tiny.make_model(tok, seed=5)
    model.set_attn_implementation("eager")
    attention = model(torch.arange(5, 65)[None], output_attentions=True).attentions[0][0, 0]       # (T, T) of layer 0, head 0
    assert (attention.argmax(1)[1:] == torch.arange(59)).all() and attention.diagonal(-1).min() > 0.5


def test_a_tiny_model_is_a_function_of_its_seed(tok):
    make = lambda seed: weights(tiny.make_model(tok, width=32, layers=2, seed=seed))
    assert torch.equal(make(3), make(3)) and not torch.equal(make(3), make(4))


def test_an_untrained_tiny_model_repeats_a_random_string(monkeypatch):
    """[20 tokens][10 others][the 20 again]: the likeliest token is the right one in most places, and nowhere without the head."""
    ids = torch.randint(2, 700, (16, 30), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([ids, ids[:, :20]], 1)                                         # (16, 50)
    tok = type("Tok", (), {"eos_token_id": 1, "pad_token_id": 0, "__len__": lambda self: 700})()

    def hits(model):
        return (model(ids).logits[:, 30:-1].argmax(-1) == ids[:, 31:]).float().mean().item()

    with torch.no_grad():
        assert min(hits(tiny.make_model(tok, seed=seed)) for seed in range(3)) > 0.75
        assert hits(tiny.make_model(tok, width=64, heads=2)) > 0.3                    # other shapes, less room
        assert hits(tiny.make_model(tok, layers=1)) < 0.05                            # one layer cannot hold it
        monkeypatch.setattr(tiny, "write_induction_head", lambda model: None)
        assert hits(tiny.make_model(tok)) < 0.05

"""Claim: `evals/metrics.py` gives nltk's BLEU and rouge_score's ROUGE-L to 1e-9, and hand-worked
values."""

import math
import random

import pytest

from evals import metrics

# (prediction, reference)
BY_HAND = [
    ("", ""), ("", "abc"), ("abc", ""), ("   ", "a b"), ("a", "a"), ("a", "b"), ("ab", "ab"),
    ("abc", "cba"), ("the cat sat on the mat", "the cat sat on the mat"),
    ("the cat sat on the mat", "the cat is on the mat"),
    ("the the the the the the the", "the cat is on the mat"), ("a a a a a a a a", "a a a"),
    ("a a a", "a a a a a a a a"), ("b a b a b a", "a b a b a b"), ("The CAT, sat!", "the cat sat"),
    ("snake_case-2nd 3.14", "snake case 2nd 3 14"),
    ("naïve café über Straße", "naive cafe uber strasse"), ("水是液体", "水是固体"),
    ("İstanbul ı K", "istanbul i k"), ("😀 ok", "ok 😀"),
    ("running runner runs easily dies", "run runners run easy died"), ("was", "wa"),
    ('{"error": "", "response": [1, 2]}', '{"error": "no", "response": []}'),
    ("x\ny\tz  w", "x y z w"), ("water " * 300, "water ice " * 200), ("ab" * 400, "ba" * 300)]


def random_pairs(n, seed=0):
    """Pairs at every distance: random text, and copies with words dropped, changed, moved."""
    rng = random.Random(seed)
    words = "a b the ice water Stove is on, off. {}: running connected é 水 42 x_y".split()
    pairs = []
    for _ in range(n):
        reference = rng.choices(
            words[: rng.randint(1, len(words))], k=rng.randint(0, rng.choice([3, 12, 40]))
        )
        prediction = [w for w in reference if rng.random() < .9] if rng.random() < .7 else []
        prediction += rng.choices(words, k=rng.randint(0, 4))
        if rng.random() < .3:
            rng.shuffle(prediction)
        pairs.append((" ".join(prediction), " ".join(reference)))
    return pairs


PAIRS = BY_HAND + random_pairs(1000)
SPLITTERS = {"char": list, "word": str.split}


# ---- Against the packages ------------------------------------------------------------------------

@pytest.mark.parametrize("level", ["char", "word"])
def test_bleu_is_nltks(level):
    nltk_bleu = pytest.importorskip("nltk.translate.bleu_score")
    method3 = nltk_bleu.SmoothingFunction().method3
    tokens = SPLITTERS[level]
    theirs = [
        nltk_bleu.sentence_bleu([tokens(r)], tokens(p), smoothing_function=method3)
        for p, r in PAIRS
    ]
    ours = [metrics.bleu_sentence(p, r, level) for p, r in PAIRS]
    assert ours == pytest.approx(theirs, abs=1e-9)
    predictions, references = zip(*PAIRS)
    mean = metrics.bleu(predictions, references, level)
    assert mean == pytest.approx(100 * sum(theirs) / len(theirs), abs=1e-9)
    # the last: empty counts as 1
    for some in (PAIRS, BY_HAND, PAIRS[30:33], [("a", "a"), ("", "b")]):
        corpus = nltk_bleu.corpus_bleu([[tokens(r)] for _, r in some], [tokens(p) for p, _ in some],
                                       smoothing_function=method3)
        predictions, references = zip(*some)
        ours = metrics.bleu(predictions, references, level, agg="corpus")
        assert ours == pytest.approx(100 * corpus, abs=1e-9)


@pytest.mark.parametrize("stemmer", [False, True])
def test_rouge_l_is_rouge_scores(stemmer):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=stemmer)
    pairs = PAIRS[:525] if stemmer else PAIRS
    theirs = [scorer.score(r, p)["rougeL"].fmeasure for p, r in pairs]
    assert [metrics.rouge_l(p, r, stemmer) for p, r in pairs] == pytest.approx(theirs, abs=1e-9)
    predictions, references = zip(*pairs)
    mean = metrics.mean_rouge_l(predictions, references, stemmer)
    assert mean == pytest.approx(100 * sum(theirs) / len(theirs), abs=1e-9)


# ---- By hand -------------------------------------------------------------------------------------

def test_bleu_by_hand():
    # "abcd" against "abce": matches 3/4, 2/3, 1/2, 0/1 -> 1/2
    assert metrics.bleu_sentence("abcd", "abce") == pytest.approx(
        (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25
    )
    # two letters against themselves: 2/2, 1/1, then 1/2 and 1/4 for the orders that do not exist
    assert metrics.bleu_sentence("ab", "ab") == pytest.approx((1 / 2 * 1 / 4) ** .25)
    # the prediction is the shorter one, so the order of arguments shows: all p_n are 1, BP = exp(1
    # - 5/4)
    assert metrics.bleu_sentence("abcd", "abcde") == pytest.approx(math.exp(-1 / 4))
    assert metrics.bleu_sentence("abcde", "abcd") == pytest.approx(
        (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    )
    # clipping: "the" counts twice only; 2/7, then 0/6 -> 1/12, 0/5 -> 1/20, 0/4 -> 1/32
    p, r = "the the the the the the the", "the cat is on the mat"
    assert metrics.bleu_sentence(p, r, "word") == pytest.approx((2 / 7 / 12 / 20 / 32) ** .25)
    assert metrics.bleu_sentence("abcd", "abcd") == 1 and metrics.bleu_sentence("abcd", "wxyz") == 0
    assert [metrics.bleu_sentence(*pair) for pair in (("", "a"), ("a", ""), ("", ""))] == [0, 0, 0]


def test_bleu_over_pairs_by_hand():
    predictions, references = ["abcd", "abcd"], ["abcd", "wxyz"]
    assert metrics.bleu(predictions, references) == 50
    # corpus: 4/8, 3/6, 2/4, 1/2 and equal lengths
    assert metrics.bleu(predictions, references, agg="corpus") == pytest.approx(50)
    # (100 + 59.4604) / 2
    assert metrics.bleu(["abcd", "abcd"], ["abcd", "abce"], rounding=True) == 79.73


def test_unknown_options_of_bleu_are_refused():
    with pytest.raises(ValueError):
        metrics.bleu(["a"], ["a"], level="token")
    with pytest.raises(ValueError):
        metrics.bleu(["a"], ["a"], agg="median")


def test_rouge_l_by_hand():
    # LCS "the cat on the mat" = 5 of 6 tokens on both sides
    assert metrics.rouge_l("the cat sat on the mat", "The cat is on the mat.") == pytest.approx(
        5 / 6
    )
    assert metrics.rouge_l("a b", "a x b y") == pytest.approx(2 * 1 * .5 / 1.5)
    assert metrics.rouge_l("b a", "a b") == pytest.approx(.5)
    assert metrics.rouge_l("a_b", "a b") == 1
    assert metrics.rouge_l("水", "水") == metrics.rouge_l("", "a") == metrics.rouge_l("", "") == 0
    assert metrics.mean_rouge_l(["a", "b"], ["a", "a"]) == 50


def test_bit_parallel_lcs_is_the_lcs():
    rng = random.Random(0)
    for _ in range(200):
        a, b = (rng.choices("abcd", k=rng.randint(0, 90)) for _ in range(2))
        row = [0] * (len(b) + 1)  # the textbook table, row by row
        for x in a:
            above, row = row, [0]
            for j, y in enumerate(b):
                row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
        assert metrics._lcs(a, b) == row[-1]


def test_exact_and_exact_changed():
    xs, predictions, references = ["a", "a", "b", "c"], ["a", "b", "b", "d"], ["a", "b", "c", "e"]
    assert metrics.exact(predictions, references) == .5
    assert metrics.exact_changed(xs, predictions, references) == pytest.approx(1 / 3)
    assert metrics.exact_changed(["a"], ["b"], ["a"]) is None
    assert metrics.exact(["a "], ["a"]) == 0  # nothing is stripped


XS, YS = ["on", "off", "lamp on"], ["on", "on", "lamp off"]


def test_fwm_scores_of_perfect_predictions():
    fwm = metrics.fwm_scores(XS, YS, YS, logps=[-1.0, -2.0, -6.0])
    assert list(fwm) == ["n", "exact", "exact_changed", "bleu", "rouge_l", "logp"]
    assert (fwm["n"], fwm["exact"], fwm["exact_changed"], fwm["rouge_l"], fwm["logp"]) == (
        3,
        1,
        1,
        100,
        -3,
    )
    assert fwm["bleu"] == metrics.bleu(YS, YS)


def test_idm_scores_of_half_right_predictions():
    idm = metrics.idm_scores(["go", "stay"], ["go", "wait"])
    assert list(idm) == ["n", "exact", "bleu", "rouge_l", "logp"]
    assert (idm["n"], idm["exact"], idm["rouge_l"], idm["logp"]) == (2, .5, 50, None)


def test_copy_x_predicts_no_change():
    copy = metrics.copy_x(XS, YS)
    assert copy == metrics.fwm_scores(XS, XS, YS) and copy["logp"] is None
    assert copy["exact"] == pytest.approx(1 / 3) and copy["exact_changed"] == 0


@pytest.mark.parametrize(
    "score", [metrics.bleu, metrics.mean_rouge_l, metrics.exact, metrics.idm_scores]
)
def test_bad_pairs_are_refused(score):
    for predictions, references in (([], []), (["a"], ["a", "b"]), ("ab", "ab")):
        with pytest.raises(ValueError, match="references"):
            score(predictions, references)


def test_bad_lengths_are_refused():
    with pytest.raises(ValueError, match="xs"):
        metrics.exact_changed(["a"], ["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match="logps"):
        metrics.fwm_scores(["a"], ["a"], ["a"], logps=[-1.0, -2.0])
    with pytest.raises(ValueError, match="empty"):
        metrics.copy_x([], [])

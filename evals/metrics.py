"""The text scores that every table here shares: exact match, BLEU-4, ROUGE-L, and the copy-x
baseline.

Claim: these few pure functions on strings give the numbers of nltk (`sentence_bleu`, `corpus_bleu`)
and of rouge-score 0.1.2 to 1e-9, in plain Python. The argument order is (prediction, reference)
EVERYWHERE; nltk and rouge_score take the reference first. Nothing is stripped or normalised before
comparing.

    BLEU    = BP * exp(mean over n = 1..4 of log p_n)
    p_n     = clipped n-gram matches / max(1, number of n-grams in the prediction)
    BP      = 1 if |prediction| > |reference|, 0 if the prediction is empty,
              else exp(1 - |reference| / |prediction|)
    ROUGE-L = 2 P R / (P + R),  P = LCS / |prediction|,  R = LCS / |reference|,  lengths in tokens

Notes:
  1. Smoothing is nltk's method3: without one matching unigram BLEU is 0; otherwise each order n
     without a match counts 1 / (2^k * its denominator), k = 1, 2, .. over such orders in turn. A
     text of fewer than 4 tokens therefore scores below 1 against itself ("ab": .59): read `exact`
     together with BLEU.
  2. `bleu(level="char", agg="mean")` is the preset `mirrorapi` of StableToolBench: n-grams of
     characters, one BLEU a pair, plain mean. `rounding=True` adds its rounding, 4 decimals a pair
     and 2 on the mean. level="word" splits on white space. Presets differ hugely on the same texts:
     print which one it is, never compare across them.
  3. agg="corpus" sums matches, denominators and lengths over pairs first; each pair adds at least 1
     to every denominator, as in nltk.
  4. ROUGE-L tokens are lower-cased runs of a-z and 0-9, so a text in another script has none and
     scores 0, even against itself. The stemmer is a flag, off by default; the paper does not say
     which its tables use.
  5. A model that copies x scores high wherever states change little. So `exact_changed` counts only
     pairs whose reference differs from x, and `copy_x` is a row of every table.
"""

import functools
import math
import re
from collections import Counter

from envs import images

# ---- BLEU ----------------------------------------------------------------------------------------


def bleu_sentence(prediction, reference, level="char"):
    """BLEU-4 with method3 smoothing of one (prediction, reference) pair, in [0, 1].

    level: "char" = n-grams of characters (preset `mirrorapi`), "word" = of words between white
    space. Source: nltk `sentence_bleu([reference], prediction,
    smoothing_function=SmoothingFunction().method3)`.
    """
    return _bleu_from_counts(*_bleu_counts(prediction, reference, level))


def bleu(predictions, references, level="char", agg="mean", rounding=False):
    """BLEU-4 of lists of strings, in [0, 100].

    agg: "mean" = mean of `bleu_sentence` (with level "char": preset `mirrorapi`),
         "corpus" = nltk `corpus_bleu` with method3.
    rounding: round as the `mirrorapi` script does, each pair to 4 decimals and the result to 2.
    """
    _check_pairs(predictions, references)
    if agg == "mean":
        scores = [100 * bleu_sentence(p, r, level) for p, r in zip(predictions, references)]
        return round(_mean([round(s, 4) for s in scores]), 2) if rounding else _mean(scores)
    if agg == "corpus":
        matches, totals, prediction_length, reference_length = [0] * 4, [0] * 4, 0, 0
        for p, r in zip(predictions, references):
            m, t, p_len, r_len = _bleu_counts(p, r, level)
            matches = [a + b for a, b in zip(matches, m)]
            totals = [a + b for a, b in zip(totals, t)]
            prediction_length += p_len
            reference_length += r_len
        score = 100 * _bleu_from_counts(matches, totals, prediction_length, reference_length)
        return round(score, 2) if rounding else score
    raise ValueError(f"agg must be 'mean' or 'corpus', not {agg!r}")


def _bleu_counts(prediction, reference, level):
    """(clipped matches for n = 1..4, denominators for n = 1..4, prediction tokens, reference
    tokens)."""
    if level == "word":
        prediction, reference = tuple(prediction.split()), tuple(reference.split())
    elif level != "char":
        raise ValueError(f"level must be 'char' or 'word', not {level!r}")
    # A slice of n tokens is hashable either way: a string of characters, a tuple of words.
    matches, totals = [], []
    for n in (1, 2, 3, 4):
        ours = Counter(prediction[i:i + n] for i in range(len(prediction) - n + 1))
        theirs = Counter(reference[i:i + n] for i in range(len(reference) - n + 1))
        matches.append(sum(min(count, theirs[gram]) for gram, count in ours.items()))
        totals.append(max(1, len(prediction) - n + 1))
    return matches, totals, len(prediction), len(reference)


def _bleu_from_counts(matches, totals, prediction_length, reference_length):
    """BP * exp(mean of log p_n) from the counts of one pair or of a corpus, in [0, 1]."""
    if matches[0] == 0:  # no unigram, so no longer n-gram either; an empty prediction ends here too
        return 0.0
    k, log_p = 0, []
    for match, total in zip(matches, totals):
        if match == 0:
            k += 1
            match = 0.5 ** k  # method3
        log_p.append(math.log(match / total))
    log_brevity = min(0.0, 1 - reference_length / prediction_length)
    return math.exp(log_brevity + math.fsum(log_p) / 4)


# ---- ROUGE-L -------------------------------------------------------------------------------------


def rouge_l(prediction, reference, stemmer=False):
    """ROUGE-L F of one (prediction, reference) pair, in [0, 1]; 0 if either side has no tokens.

    stemmer: Porter-stem tokens longer than 3 characters; needs the optional package nltk.
    Source: rouge-score 0.1.2, `RougeScorer(["rougeL"], use_stemmer).score(reference, prediction)`.
    """
    p, r = _rouge_tokens(prediction, stemmer), _rouge_tokens(reference, stemmer)
    common = _lcs(p, r)
    if common == 0:
        return 0.0
    precision, recall = common / len(p), common / len(r)
    return 2 * precision * recall / (precision + recall)


def mean_rouge_l(predictions, references, stemmer=False):
    """Mean of `rouge_l` over lists of strings, in [0, 100]."""
    _check_pairs(predictions, references)
    return 100 * _mean([rouge_l(p, r, stemmer) for p, r in zip(predictions, references)])


def _rouge_tokens(text, stemmer):
    tokens = re.findall("[a-z0-9]+", text.lower())
    if stemmer:
        stem = _porter().stem
        tokens = [stem(token) if len(token) > 3 else token for token in tokens]
    return tokens


def has_tokens(text):
    """Whether ROUGE-L finds anything in a text."""
    return re.search("[a-z0-9]", text.lower()) is not None


@functools.lru_cache(maxsize=1)
def _porter():
    try:
        from nltk.stem.porter import PorterStemmer
    except ImportError:
        raise ImportError("stemmer=True needs the package nltk (pip install nltk)") from None
    return PorterStemmer()


def _lcs(a, b):
    """Length of the longest common subsequence of two token lists, exact.

    Bit-parallel (Hyyro 2004): a row of the dynamic programme is one Python integer whose bit i is 0
    where the LCS with a[:i+1] exceeds that with a[:i]; an addition carries a whole row: |b| steps,
    not |a| * |b| cells.
    """
    where = {}  # token -> bits of its positions in a
    for i, token in enumerate(a):
        where[token] = where.get(token, 0) | (1 << i)
    ones = (1 << len(a)) - 1
    row = ones
    for token in b:
        hits = row & where.get(token, 0)
        row = ((row + hits) | (row - hits)) & ones
    return len(a) - bin(row).count("1")


# ---- Exact match, and the rows of results.json ---------------------------------------------------


def exact(predictions, references):
    """Share of pairs with prediction == reference, in [0, 1]."""
    _check_pairs(predictions, references)
    return _mean([p == r for p, r in zip(predictions, references)])


def exact_changed(xs, predictions, references):
    """Share of exact matches among the pairs with reference != x, in [0, 1]; None if there are
    none."""
    _check_pairs(predictions, references)
    _check_length("xs", xs, references)
    hits = [p == r for x, p, r in zip(xs, predictions, references) if r != x]
    return _mean(hits) if hits else None


def right_patches(predictions, references, xs=None):
    """Share of patches of the reference images that are right, pooled, in [0, 1]; with xs, only
    of those that differ from x (None if there are none). A prediction that is no image of the same
    size has none right."""
    right = []
    for x, p, r in zip(xs or predictions, predictions, references):
        theirs = images.patches(r)
        ours = images.patches(p) or []
        before = images.patches(x) if xs else [None] * len(theirs)
        right += [
            len(ours) == len(theirs) and ours[i] == theirs[i]
            for i in range(len(theirs))
            if before[i] != theirs[i]
        ]
    return _mean(right) if right else None


def fwm_scores(xs, predictions, references, logps=None):
    """The FWM row of results.json: n, exact, exact_changed, bleu, rouge_l, logp.

    xs, predictions, references: lists of the states x, the predicted y and the true y. logps: list
    of summed token log-probabilities log P(y | x, z) of the true y; logp is their mean, or None.
    exact, exact_changed in [0, 1]; bleu (characters, mean) and rouge_l (no stemmer) in [0, 100]. Of
    images also `patches_changed`.
    """
    row = idm_scores(predictions, references, logps)
    changed = exact_changed(xs, predictions, references)
    row = {"n": row["n"], "exact": row["exact"], "exact_changed": changed, "bleu": row["bleu"],
           "rouge_l": row["rouge_l"], "logp": row["logp"]}
    return (
        row | {"patches_changed": right_patches(predictions, references, xs)}
        if images.is_image(references[0])
        else row
    )


def by_group(groups, xs, predictions, references):
    """{group: {"n", "exact_changed", "patches_changed"}} of images, in [0, 1]; groups: a name for
    each of them."""
    out = {}
    for group in sorted(set(groups)):
        rows = [row for g, *row in zip(groups, xs, predictions, references) if g == group]
        x, p, r = zip(*rows)
        out[group] = {
            "n": len(rows), "exact_changed": exact_changed(x, p, r),
            "patches_changed": right_patches(p, r, x)}
    return out


def idm_scores(predictions, references, logps=None):
    """The IDM row of results.json: n, exact, bleu, rouge_l, logp, for lists of predicted z and true
    z.

    logps: list of summed token log-probabilities log Q(z | x, y) of the true z. Ranges as in
    `fwm_scores`.
    """
    _check_pairs(predictions, references)
    if logps is not None:
        _check_length("logps", logps, references)
    return {"n": len(references),
            "exact": exact(predictions, references),
            "bleu": bleu(predictions, references),
            "rouge_l": mean_rouge_l(predictions, references),
            "logp": None if logps is None else _mean(logps)}


def copy_x(xs, references):
    """The FWM row of the model that predicts that nothing happens, y_hat = x; logp is None."""
    return fwm_scores(xs, xs, references)


# ---- Small change --------------------------------------------------------------------------------


def _mean(values):
    return math.fsum(values) / len(values)


def _check_pairs(predictions, references):
    if isinstance(predictions, str) or isinstance(references, str):
        raise ValueError("predictions and references must be lists of strings, not one string")
    _check_length("predictions", predictions, references)
    if len(references) == 0:
        raise ValueError("no pairs to score: predictions and references are empty")


def _check_length(name, values, references):
    if len(values) != len(references):
        raise ValueError(
            f"{name} and references differ in length: {len(values)} and {len(references)}"
        )

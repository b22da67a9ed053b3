"""ScienceWorld: predict the next state of a text game. ROUGE-L, BERTScore and exact match, next
to the scores of copying x.

    python -m evals.scienceworld --pairs predictions.jsonl --json scores.json
    python -m evals.scienceworld --pairs predictions.jsonl --encoder roberta-large
    python -m evals.scienceworld --run runs/scienceworld-tiny-0

Claim: ROUGE-L is that of rouge_score 0.1.2, BERTScore that of bert-score 0.3.13 without idf or
rescaling; plain means over pairs, in [0, 100]. Any "split" of the pairs gets a row of its own;
"all" pools them.

x = the room and the inventory as text, z = the action, y = both after it.

Notes:
  1. A state changes in few lines, so copying x is strong. On data/scienceworld200.jsonl.gz its
     ROUGE-L is 89.1, and 86.8 on the transitions that change. Judge a model on "changed only",
     against its copy-x.
  2. The paper's split, states and stemmer are not released; its ROUGE-L and BERTScore probably
     come from these packages.
  3. BERTScore reads the first 510 tokens of a state with roberta-large; the line above the table
     says how many texts are longer.
"""
import sys

from evals import common


def main(argv=None):
    parser = common.parser(__doc__)
    common.add_encoder(parser)
    args = parser.parse_args(argv)
    return common.report("scienceworld", args, *common.state_columns(args))


if __name__ == "__main__":
    sys.exit(main())

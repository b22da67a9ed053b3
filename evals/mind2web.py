"""Mind2Web: predict the next page of a web site as HTML. ROUGE-L, BERTScore and exact match, next
to the scores of copying x.

    python -m evals.mind2web --pairs predictions.jsonl --encoder roberta-large --json scores.json
    python -m evals.mind2web --pairs test_task=task.jsonl test_website=website.jsonl \\
        test_domain=domain.jsonl

Claim: ROUGE-L is that of rouge_score 0.1.2, BERTScore that of bert-score 0.3.13 without idf or
rescaling; plain means over pairs, in [0, 100]. Each split gets a row of its own; "all" pools them.

x = the cleaned page before the action, z = the action (one of action_reprs), y = the cleaned page
before the next action; a task's last action has no y.

Notes:
  1. Pages have 10^4 to 10^6 characters and must be pruned before a model reads them. The paper's
     pruning is not released, and the scores depend on it. Texts are scored as the pairs file holds
     them. Say with every score how you pruned.
  2. BERTScore reads the first 510 tokens of a page with roberta-large, which is often its head; the
     line above the table says how many texts are longer. ROUGE-L reads everything.
  3. Element accuracy, operation F1 and step success are scores of agents that choose z, not of a
     world model.
"""
import sys

from evals import common

SPLITS = ("test_task", "test_website", "test_domain")


def main(argv=None):
    parser = common.parser(__doc__)
    common.add_encoder(parser)
    args = parser.parse_args(argv)
    return common.report("mind2web", args, *common.state_columns(args), SPLITS)


if __name__ == "__main__":
    sys.exit(main())

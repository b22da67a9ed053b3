"""Mind2Web as a world: which page does a click, a word or a choice lead to?

    python -m envs.mind2web --train data/train/*.json --test data/test_task/*.json \\
        --out mind2web.jsonl.gz
    python train.py --data mind2web.jsonl.gz --model MODEL

Claim: of a task with pages h_1 .. h_n and action texts z_1 .. z_n,

    x = cut(h_i)    z = z_i ("[button]  Search -> CLICK")    y = cut(h_{i+1})        i = 1 .. n - 1

where x is a function of h_i and the target of z_i alone: it holds nothing of h_{i+1}. y is cut by
the same function of h_{i+1} and the same target. Source: osunlp/Mind2Web, a JSON list of tasks with
annotation_id, action_reprs and actions, of which cleaned_html (the page before the action) and
pos_candidates are read.

The cut. Pages have 10^4 to 10^6 characters. `cut` keeps one stretch of at most --budget characters:
  1. The target is the first element among pos_candidates (the original target before the others)
     that is on the page. Half of the budget lies before its tag, half from there on; at the page's
     start or end, the stretch moves inwards.
  2. At both ends the stretch then shrinks to whole tags, unless that would lose the target's tag.
  3. A page that does not have the target is cut from its start: often a y of another address. (By
     chance its numbers may name another element.)
  4. Each end that was cut holds <!-- N characters left out -->, beyond the budget. The command
     prints the sums, and how often all that changed was left out: y is x then, but for an N that
     nobody could foretell.

What a model at test time can know: x, and z with its target, which is what the stretch is cut
around. Where the page will change it cannot know. --around change cuts both pages around the first
character in which they differ: shorter texts hold more of the news, but x then says where something
will happen. Do not compare such scores with others.

Departures:
  1. SWIRL's own cut is not released; this one is ours, so print the budget with every score.
  2. The attribute backend_node_id, a number of the browser that recorded the page, is taken out
     first: it fills a third to a half of the text, and no model can know those of a new page.
     --keep-ids keeps it.
  3. The last action of a task has no next page and is not used. A task with a fault is left out
     whole.
  4. The next page may owe something to what the person did unseen in between (scrolling, waiting).
"""

import argparse
import collections
import os
import re

from envs import official, records
from envs.official import need
from envs.records import BadData

BUDGET = 4000  # characters; markup takes about 3 a token, so x, z and y fit a context of 4096
# the lookbehind: no search begins in the middle of the blanks
_ID = re.compile(r'(?<!\s)\s+backend_node_id="[^"]*"')
_NODE = re.compile(r' backend_node_id="([^"]*)"')


def stretch(html, at, budget):
    """(begin, end) of the at most `budget` characters of `html` (str) around position `at` that
    rules 1 and 2 keep.

    at: int in [0, len(html)], the target's "<"; budget: int >= 1. A page within the budget is kept
    whole.
    """
    if len(html) <= budget:
        return 0, len(html)
    begin = max(0, min(at - budget // 2, len(html) - budget))
    end = begin + budget
    if begin > 0:
        tag = html.find("<", begin, at + 1)
        begin = tag if tag >= 0 else begin
    if end < len(html):
        end = html.rfind(">", at, end) + 1 or end
    return begin, end


def cut(html, at, budget):
    """The stretch of `html` with the marks of rule 4; arguments as for `stretch`."""
    begin, end = stretch(html, at, budget)
    mark = "<!-- {} characters left out -->".format
    return (
        (mark(begin) if begin else "")
        + html[begin:end]
        + (mark(len(html) - end) if end < len(html) else "")
    )


def find(html, nodes):
    """Position of the "<" of the first element of `nodes` (list of backend_node_id) in `html`, or
    None."""
    first = {}
    for found in _NODE.finditer(html):
        first.setdefault(found[1], found.start())
    at = next((first[node] for node in nodes if node in first), None)
    return None if at is None else max(0, html.rfind("<", 0, at))


def targets(candidates):
    """The backend_node_ids of pos_candidates (list of dict), the original target first."""
    candidates = [
        c
        for c in candidates
        if isinstance(c, dict) and isinstance(c.get("backend_node_id"), (str, int))
    ]
    return [
        str(c["backend_node_id"])
        for c in sorted(candidates, key=lambda c: not c.get("is_original_target"))
    ]


def without_ids(html, at):
    """(html without the attribute backend_node_id, where position `at`, the start of a tag, is
    then)."""
    head = _ID.sub("", html[:at])
    return head + _ID.sub("", html[at:]), len(head)


def pair(h, h_next, nodes, budget=BUDGET, around="target", keep_ids=False, counts=None):
    """(x, y) of two pages (str) and the targets of the action between them (list of
    backend_node_id).

    counts: Counter of what was cut, or None.
    """
    counts, pages = collections.Counter() if counts is None else counts, []
    for html in (h, h_next):
        at = find(html, nodes)
        pages.append((html, at or 0) if keep_ids else without_ids(html, at or 0))
    counts["targets that are not on the page x"] += find(h, nodes) is None
    if around == "change":
        at = len(os.path.commonprefix([html for html, _ in pages]))
        pages = [(html, at) for html, _ in pages]
    kept = [html[slice(*stretch(html, at, budget))] for html, at in pages]
    for (html, _), part in zip(pages, kept):
        counts["pages cut, x and y apart"] += len(part) < len(html)
        counts["characters left out of them"] += len(html) - len(part)
    lost = kept[0] == kept[1] and pages[0][0] != pages[1][0]
    counts["transitions whose change was cut away (y = x but for the marks)"] += lost
    return tuple(cut(html, at, budget) for html, at in pages)


def task(row, split, name, place, seen=(), **options):
    """[Transition] of one task (dict); BadData, which begins with `place`, says what is wrong with
    it."""
    actions, reprs = need(row, "actions", list, place), need(row, "action_reprs", list, place)
    annotation = need(row, "annotation_id", str, place)
    if annotation in seen:
        raise BadData(f"{place}: the task {annotation} is there twice")
    if len(actions) != len(reprs):
        raise BadData(f"{place}: {len(actions)} actions, but {len(reprs)} action_reprs")
    pages = [
        need(action, "cleaned_html", str, f"{place}, action {i}")
        for i, action in enumerate(actions, 1)
    ]
    found = []
    for t in range(len(actions) - 1):
        where = f"{place}, action {t + 1}"
        nodes = targets(need(actions[t], "pos_candidates", list, where))
        # before the cut: an empty page has nothing to mark
        if not pages[t].strip() or not pages[t + 1].strip():
            raise BadData(f"{where}: its page or the next one is empty")
        x, y = pair(pages[t], pages[t + 1], nodes, **options)
        record = {"episode": f"{split}-{name}-{annotation}", "t": t, "x": x, "z": reprs[t], "y": y}
        found.append(records.check(record, where))
    return found


def make(args, broken, counts):
    """Yields the transitions of all files; see official.main."""
    if args.budget < 1:
        raise BadData(f"--budget cannot be {args.budget}; give characters, as in 4000")
    for split, name, path in official.files(args):
        seen = set()
        for _, place, row in official.rows(path, broken):
            told = collections.Counter()
            try:
                found = task(
                    row,
                    split,
                    name,
                    place,
                    seen,
                    budget=args.budget,
                    around=args.around,
                    keep_ids=args.keep_ids,
                    counts=told,
                )
            except BadData as error:
                broken.append(str(error))
                continue
            seen.add(row["annotation_id"])
            counts.update(told)
            counts["tasks of a single action, which have no next page"] += not found
            yield from found


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m envs.mind2web", description="Mind2Web files to a transitions file."
    )
    official.add_files(parser)
    parser.add_argument(
        "--budget",
        type=int,
        default=BUDGET,
        help=f"characters of a page that are kept, at most [{BUDGET}]",
    )
    parser.add_argument(
        "--around",
        choices=["target", "change"],
        default="target",
        help="what is kept: around the action's element, or the first difference (tells where) "
             "[target]",
    )
    parser.add_argument(
        "--keep-ids", action="store_true", help="keep the attribute backend_node_id"
    )
    return official.main(parser, make, argv)


if __name__ == "__main__":
    raise SystemExit(main())

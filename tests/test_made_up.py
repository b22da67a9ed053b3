"""Claims of `envs/made_up.py`: its transitions are sound and of many forms, and nothing in it comes
from the other worlds."""
import ast
import json
import random
import re
from collections import Counter

import pytest

from envs import made_up, physics, tools, web

WORLDS = {"tools": tools, "physics": physics, "web": web}
SOURCE = open(made_up.__file__).read()
DRAWN = [made_up.transition(random.Random(seed)) for seed in range(2000)]

# Words of the worlds that stand in the source, each because no text about things and what is done
# to them lacks it:
COMMON = {
    "on", "off", "open", "yes",                          # pairs of opposites
    "put", "take", "add", "remove", "clear", "close", "empty", "transfer", "turn",      # verbs
    "in", "into", "to", "of", "for", "the", "next",      # links
    "none", "nothing",                    # values of anything, how anything ends
    # Words of the code itself (`max(`) and of its docstring
    "name", "list", "amount", "call", "max", "post"}


# --- the transitions ------------------------------------------------------------------------------

def test_a_transition_is_a_function_of_its_seed():
    again = [made_up.transition(random.Random(seed)) for seed in range(100)]
    assert again == DRAWN[:100] and len(set(DRAWN)) > 1990


def test_state_action_and_next_state_are_text():
    assert all(isinstance(text, str) and text.strip() for row in DRAWN for text in row)


def test_most_states_are_short_and_some_are_long():
    lengths = sorted(len(x) for x, _, _ in DRAWN)
    assert lengths[1000] < 800 and sum(n > 1500 for n in lengths) > 20 and lengths[0] < 60


def test_cells_are_no_more_than_asked():
    few = [made_up.transition(random.Random(seed), most=4) for seed in range(300)]
    assert max(len(x) for x, _, _ in few) < 700 < max(len(x) for x, _, _ in DRAWN)


def test_some_transitions_change_nothing():
    share = sum(x == y for x, _, y in DRAWN) / len(DRAWN)
    assert 0.10 < share < 0.35


def test_little_changes_at_a_time():
    """Of a state of many lines most stay, where they stood or moved by one that came or went."""
    kept = [len(Counter(x.split("\n")) & Counter(y.split("\n"))) / len(x.split("\n"))
            for x, _, y in DRAWN if x.count("\n") > 9]
    assert len(kept) > 400 and sorted(kept)[len(kept) // 2] > 0.85


def test_each_form_of_state_and_of_action_occurs():
    worlds = [made_up.World(random.Random(seed)) for seed in range(700)]
    states, actions = (Counter(getattr(world, name) for world in worlds)
                       for name in ("form", "speech"))
    assert set(states) == set(made_up.FORMS) and min(states.values()) > 50
    assert set(actions) == set(made_up.SPEECH) and min(actions.values()) > 50


def test_forms_are_what_they_are_called():
    for seed in range(300):
        world = made_up.World(random.Random(seed))
        text = world.text()
        if world.form == "json":
            assert set(json.loads(text)) - {"answer"} == {cell.thing for cell in world.cells}
        if world.form == "html":
            things = {cell.thing for cell in world.cells}
            assert text.count(f"<{world.tag} ") == text.count(f"</{world.tag}>") == len(things)
        if world.form == "lines":
            assert text.count("\n") + 1 == len(world.cells) + bool(world.feedback)


def test_each_kind_of_action_occurs_and_some_fail():
    verbs = {verb.replace(" ", "_") for names in made_up.VERBS.values() for verb in names}
    said = {re.match(r'(?:\{"do": ")?([a-z_ ]+)', z).group(1).strip().replace(" ", "_")
            for _, z, _ in DRAWN}
    found = {verb for verb in verbs if any(z == verb or z.startswith(verb + "_") for z in said)}
    assert len(found) > 0.9 * len(verbs)
    assert sum("failed: " in y and "failed: " not in x for x, _, y in DRAWN) > 20


# --- no leak --------------------------------------------------------------------------------------

def strings(module):
    """String constants of a module's code, those of f-strings too, without docstrings."""
    tree = ast.parse(open(module.__file__).read())
    docs = {id(node.body[0].value) for node in ast.walk(tree)
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and isinstance(node.body[0], ast.Expr)}
    return {node.value for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            and id(node) not in docs}


def flat(*tables):
    """All strings in tables of tables, and the words of those with a dash."""
    out = set()
    for table in tables:
        if isinstance(table, str):
            out |= {table, *table.split("-")}
        elif isinstance(table, dict):
            out |= flat(*table, *table.values())
        elif isinstance(table, (tuple, list)):
            out |= flat(*table)
    return out


TABLES = {
    "tools": flat(tools.PRICE, tools.CITY, tools.VALUES, tools.CALLS),
    "physics": flat(physics.SUBSTANCES, physics.RECIPES, physics.STOCK, physics.VESSELS,
                    physics.PLACES, physics.KINDS),
    "web": flat(web.PRICES, web.THINGS, web.COLOURS, web.SORTS, web.NAMES, web.STREETS, web.TIMES,
                web.FORM, web.DELIVERY, web.COUPONS, web.ACTIONS)}


def in_the_source(texts):
    """Which of them stand in made_up.py, as whole words, and are not common."""
    trimmed = {text.strip(" ,:->?[]().\n") for text in texts}
    return {text for text in trimmed - COMMON if re.search("[a-zA-Z]{2}", text)
            and re.search(rf"(?<![A-Za-z]){re.escape(text)}(?![A-Za-z])", SOURCE)}


def test_the_source_imports_none_of_the_worlds():
    nodes = list(ast.walk(ast.parse(SOURCE)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert set(names) == {"functools", "json", "random", "sys", "dataclasses", "pathlib"}
    assert not re.search(r"__import__|importlib|exec\(|eval\(", SOURCE)


def test_what_is_called_common_is_used_and_looked_for():
    """No word stays in the list that no longer stands in the source; what is not common would be
    found."""
    assert all(re.search(rf"(?<![A-Za-z]){word}(?![A-Za-z])", SOURCE) for word in COMMON)
    assert in_the_source({"nobody", "caramel"}) == {"nobody"}


@pytest.mark.parametrize("world", WORLDS)
def test_no_name_of_the_worlds_stands_in_the_source(world):
    assert {"caramel", "pot", "rome-hotel", "mia", "book", "chair", "mill lane"} & TABLES[world]
    assert in_the_source(TABLES[world]) == set()


@pytest.mark.parametrize("world", WORLDS)
def test_no_template_of_the_worlds_is_in_the_source(world):
    assert in_the_source(strings(WORLDS[world])) == set()


@pytest.mark.parametrize("world", WORLDS)
def test_no_line_of_the_worlds_is_printed(world):
    rows = [row for seed in range(50) for row in WORLDS[world].episode(random.Random(seed))]
    theirs, ours = ({line for x, _, y in some for s in (x, y) for line in s.split("\n")}
                    for some in (rows, DRAWN))
    assert len(theirs) > 90 and theirs & ours == set()


@pytest.mark.parametrize("world", WORLDS)
def test_no_action_of_the_worlds_is_printed(world):
    theirs = {z for seed in range(50) for _, z, _ in WORLDS[world].episode(random.Random(seed))}
    assert len(theirs) > 50 and not theirs & {z for _, z, _ in DRAWN}

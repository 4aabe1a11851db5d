"""Logic problems: knights and knaves, truth tables, kinship."""

import random
from collections.abc import Callable
from itertools import product
from typing import Any

from models.reasoner.problem import Draft, Family, compared, shuffled

Rng = random.Random
PEOPLE = (
    ("Tom", "小明"), ("Ann", "小红"), ("Bob", "小刚"), ("Lily", "小丽"), ("Jack", "小军"), ("Mary", "小芳"),
    ("Leo", "小华"), ("Nina", "小燕"),
)  # fmt: skip
_CLAIMS: dict[str, tuple[Callable[[bool, bool], bool], str, str]] = {
    "knight": (lambda me, other: other, "{1} is a knight", "{1}是骑士"),
    "knave": (lambda me, other: not other, "{1} is a knave", "{1}是骗子"),
    "same": (lambda me, other: me == other, "{1} and I are of the same kind", "{1}和我是同一种人"),
    "different": (lambda me, other: me != other, "{1} and I are of different kinds", "{1}和我不是同一种人"),
    "both": (lambda me, other: me and other, "{1} and I are both knights", "{1}和我都是骑士"),
    "some": (lambda me, other: not (me and other), "at least one of {1} and me is a knave", "{1}和我至少有一个是骗子"),
    "neither": (lambda me, other: not me and not other, "{1} and I are both knaves", "{1}和我都是骗子"),
}


def _claim_is_true(claim: tuple[str, int], speaker: int, kinds: tuple[bool, ...]) -> bool:
    return _CLAIMS[claim[0]][0](kinds[speaker], kinds[claim[1]])


def _consistent(claims: tuple[tuple[str, int], ...]) -> list[tuple[bool, ...]]:
    worlds = product((True, False), repeat=len(claims))
    return [w for w in worlds if all(_claim_is_true(c, i, w) == w[i] for i, c in enumerate(claims))]


def draw_knights(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    size = 3 if is_hard else 2
    while True:
        claims = tuple((rng.choice(list(_CLAIMS)), rng.choice([j for j in range(size) if j != i])) for i in range(size))
        if len(_consistent(claims)) == 1:
            return tuple(rng.sample(range(len(PEOPLE)), size)), claims


def render_knights(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    people, claims = parameters
    names = [PEOPLE[person][is_chinese] for person in people]
    answer = _consistent(claims)[0]
    others = [w for w in product((True, False), repeat=len(claims)) if w != answer]
    worlds = rng.sample([answer, *rng.sample(others, 3)], 4)
    lines = []
    for letter, world in zip("ABCD", worlds, strict=True):
        line = f"{letter} {''.join('KN'[not kind] for kind in world)}:"
        for speaker, claim in enumerate(claims):
            said = _claim_is_true(claim, speaker, world)
            line += f" {names[speaker]} {'TF'[not said]}"
            if said != world[speaker]:
                break
        lines.append(f"{line} {'ok' if world == answer else 'no'}")
        if world == answer:
            break

    def describe(world: tuple[bool, ...]) -> str:
        kinds = ("骑士", "骗子") if is_chinese else (" knight", " knave")
        return (", " if not is_chinese else "，").join(
            f"{n}{'是' if is_chinese else ':'}{kinds[not k]}" for n, k in zip(names, world, strict=True)
        )

    say = "{0}说：“{2}。”" if is_chinese else '{0} says: "{2}."'
    said_lines = [
        say.format(names[i], "", _CLAIMS[c[0]][1:][is_chinese].format("", names[c[1]])) for i, c in enumerate(claims)
    ]
    if is_chinese:
        text = "骑士总说真话，骗子总说假话。" + "".join(said_lines) + "他们各是什么人？"
    else:
        text = f"Knights always tell the truth, knaves always lie. {' '.join(said_lines)} What are they?"
    return Draft(text, "\n".join(lines), describe(answer), tuple(describe(world) for world in worlds))


Literal = tuple[int, bool]  # variable, is_negated


def draw_truth(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    num_variables = 3 if is_hard else rng.choice((2, 3))
    literals = tuple((rng.randrange(num_variables), rng.random() < 0.4) for _ in range(4 if is_hard else 3))
    operators = tuple(rng.choice(("and", "or") if not is_hard else ("and", "or", "xor")) for _ in literals[1:])
    return num_variables, literals, operators, tuple(rng.random() < 0.5 for _ in range(num_variables))


_APPLY: dict[str, Callable[[bool, bool], bool]] = {
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "xor": lambda a, b: a != b,
}


def _letter(value: bool) -> str:
    return "T" if value else "F"


def formula_text(literals: tuple[Literal, ...], operators: tuple[str, ...]) -> str:
    """`((p and not q) or r) and p`: brackets to the left."""
    words = [("not " if negated else "") + "pqr"[variable] for variable, negated in literals]
    text = words[0]
    for position, (operator, word) in enumerate(zip(operators, words[1:], strict=True)):
        text = f"({text})" if position else text
        text = f"{text} {operator} {word}"
    return text


def formula_steps(literals: Any, operators: Any, values: tuple[bool, ...]) -> tuple[str, bool]:
    """Literal by literal, then one operator after the other."""
    leaves = [values[variable] != negated for variable, negated in literals]
    line, total = " ".join(_letter(leaf) for leaf in leaves), leaves[0]
    for operator, leaf in zip(operators, leaves[1:], strict=True):
        result = _APPLY[operator](total, leaf)
        line += f"; {_letter(total)} {operator} {_letter(leaf)}={_letter(result)}"
        total = result
    return line, total


def render_truth(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    _, literals, operators, values = parameters
    given = ", ".join(f"{'pqr'[i]}={_letter(v)}" for i, v in enumerate(values))
    line, result = formula_steps(literals, operators, values)
    formula = formula_text(literals, operators)
    if is_chinese:
        text = f"已知 {given}（T 为真，F 为假），求 {formula} 的真值（回答 T 或 F）。"
    else:
        text = f"Given {given} (T is true, F is false), find the truth value of {formula} (answer T or F)."
    return Draft(text, line, _letter(result))


def draw_satisfy(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    while True:
        num_variables, literals, operators, _ = draw_truth(rng, is_hard)
        worlds = list(product((True, False), repeat=num_variables))
        true = [w for w in worlds if formula_steps(literals, operators, w)[1]]
        false = [w for w in worlds if not formula_steps(literals, operators, w)[1]]
        if true and len(false) >= 3:
            return num_variables, literals, operators, (rng.choice(true), *rng.sample(false, 3))


def render_satisfy(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    _, literals, operators, worlds = parameters

    def describe(world: tuple[bool, ...]) -> str:
        return ", ".join(f"{'pqr'[i]}={_letter(v)}" for i, v in enumerate(world))

    options = rng.sample(worlds, 4)
    lines = []
    for letter, world in zip("ABCD", options, strict=True):
        line, result = formula_steps(literals, operators, world)
        lines.append(f"{letter} {describe(world)}: {line}")
        if result:
            break
    formula = formula_text(literals, operators)
    text = f"Which values make the formula {formula} true?"
    if is_chinese:
        text = f"哪一组取值使公式 {formula} 为真？"
    return Draft(text, "\n".join(lines), describe(worlds[0]), tuple(describe(w) for w in options))


# A is <first> of B and B is <second> of C; up = parent, down = child, side = sibling.
_COMPOSED = {
    ("up", "up"): "up2", ("up", "side"): "up", ("side", "up"): "uncle", ("down", "down"): "down2",
    ("down", "side"): "nephew", ("side", "down"): "down", ("side", "side"): "side", ("down", "up"): "side",
    ("up2", "side"): "up2", ("up2", "up"): "up3", ("uncle", "side"): "uncle", ("nephew", "up"): "cousin",
    ("nephew", "side"): "nephew", ("down2", "down"): "down3",
}  # fmt: skip
_WORDS: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {  # (he, she) in English and Chinese
    "up": (("father", "mother"), ("父亲", "母亲")),
    "down": (("son", "daughter"), ("儿子", "女儿")),
    "side": (("brother", "sister"), ("兄弟", "姐妹")),
    "up2": (("grandfather", "grandmother"), ("祖父或外祖父", "祖母或外祖母")),
    "down2": (("grandson", "granddaughter"), ("孙子或外孙", "孙女或外孙女")),
    "uncle": (("uncle", "aunt"), ("叔伯或舅舅", "姑姑或姨妈")),
    "nephew": (("nephew", "niece"), ("侄子或外甥", "侄女或外甥女")),
    "up3": (("great-grandfather", "great-grandmother"), ("曾祖父或外曾祖父", "曾祖母或外曾祖母")),
    "down3": (("great-grandson", "great-granddaughter"), ("曾孙或外曾孙", "曾孙女或外曾孙女")),
    "cousin": (("cousin", "cousin"), ("堂表兄弟", "堂表姐妹")),
}


def draw_kinship(rng: Rng, is_hard: bool) -> tuple[Any, ...]:
    length = 3 if is_hard else 2
    while True:
        links = tuple(rng.choice(("up", "down", "side")) for _ in range(length))
        relation: str | None = links[0]
        for link in links[1:]:
            relation = _COMPOSED.get((relation or "", link))
        if relation is not None:
            women = tuple(rng.random() < 0.5 for _ in range(length))
            return links, women, tuple(rng.sample(range(len(PEOPLE)), length + 1))


def kinship_parts(parameters: Any, is_chinese: bool) -> tuple[str, str, str, str]:
    """(the facts, the steps, the relation's key, the answer)."""
    links, women, people = parameters
    names = [PEOPLE[person][is_chinese] for person in people]
    form = "{0}是{1}的{2}" if is_chinese else "{0} is {1}'s {2}"
    facts, steps, relation = [], [], links[0]
    for position, (link, is_woman) in enumerate(zip(links, women, strict=True)):
        facts.append(form.format(names[position], names[position + 1], _WORDS[link][is_chinese][is_woman]))
        if position:
            steps.append(f"{relation} {link}")
            relation = _COMPOSED[relation, link]
            word = _WORDS[relation][is_chinese][women[0]]
            steps[-1] += f" = {relation}: {form.format(names[0], names[position + 1], word)}"
    answer = _WORDS[relation][is_chinese][women[0]]
    stop, gap = ("。", "") if is_chinese else (".", " ")
    return gap.join(fact + stop for fact in facts), "\n".join(steps), relation, answer


def render_kinship(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    facts, steps, relation, answer = kinship_parts(parameters, is_chinese)
    links, women, people = parameters
    first, last = PEOPLE[people[0]][is_chinese], PEOPLE[people[len(links)]][is_chinese]
    others = [words[is_chinese][women[0]] for key, words in _WORDS.items() if key != relation]
    question = f"{first}是{last}的什么人？" if is_chinese else f" What is {first} to {last}?"
    options = shuffled([answer, *rng.sample(others, 3)], rng)
    return Draft(facts + question, f"{steps}\n{compared(options, answer)}", answer, options)


def render_kinship_short(parameters: Any, is_chinese: bool, rng: Rng) -> Draft:
    draft = render_kinship(parameters, is_chinese, rng)
    return Draft(draft.prompt, kinship_parts(parameters, is_chinese)[1], draft.answer)


FAMILIES = (
    Family("knights", "choice", draw_knights, render_knights),
    Family("satisfy", "choice", draw_satisfy, render_satisfy),
    Family("kinship", "choice", draw_kinship, render_kinship),
    Family("truth", "generic-generate", draw_truth, render_truth),
)

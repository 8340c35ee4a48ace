"""Commands to a smart home with the parse that is right for them, sampled from home-assistant-intents.

Templates are filled at random with a made-up household's names; hassil, the parser of the same project, then reads
each command, and what it says is the truth: a verifiable feedback. Commands that it reads as another intent are left
out. Templates with free text, and those that need to know where the speaker stands, are not sampled.

The packages are date-versioned; tested with home-assistant-intents 2026.10.27 and hassil 3.12.1 (both Apache-2.0).
"""

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf_jax.errors import missing_extra

__all__ = ["HOUSEHOLD", "OPENS", "RARE", "Command", "sample_commands", "split_templates"]


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:  # `sample_commands` says so
        return None


hassil, home_assistant_intents = _optional("hassil"), _optional("home_assistant_intents")

HOUSEHOLD: dict[str, dict[str, list[str]]] = {
    "en": {
        "area": ["kitchen", "living room", "bedroom", "bathroom", "hallway", "office"],
        "floor": ["ground", "first", "top"],
        "light": ["bedside lamp", "reading light", "desk lamp"],
        "lock": ["front door", "back door", "garden gate", "cellar door"],
        "cover": ["left blind", "big curtain"],
        "fan": ["ceiling fan"],
        "switch": ["coffee machine", "heater"],
        "media_player": ["radio", "television"],
        "climate": ["thermostat"],
        "vacuum": ["robot"],
        "scene": ["movie night", "party"],
        "script": ["good night"],
        "sensor": ["outdoor temperature"],
        "binary_sensor": ["smoke alarm"],
        "valve": ["water valve"],
        "lawn_mower": ["mower"],
        "weather": ["London"],
        "person": ["Anna"],
        "button": ["doorbell"],
    },
    "de": {
        "area": ["Küche", "Wohnzimmer", "Schlafzimmer", "Bad", "Flur", "Büro"],
        "floor": ["Erdgeschoss", "Obergeschoss", "Keller"],
        "light": ["Nachttischlampe", "Leselampe", "Schreibtischlampe"],
        "lock": ["Haustür", "Hintertür", "Gartentor", "Kellertür"],
        "cover": ["linke Jalousie", "große Gardine"],
        "fan": ["Deckenventilator"],
        "switch": ["Kaffeemaschine", "Heizlüfter"],
        "media_player": ["Radio", "Fernseher"],
        "climate": ["Thermostat"],
        "vacuum": ["Staubsauger"],
        "scene": ["Filmabend", "Party"],
        "script": ["Gute Nacht"],
        "sensor": ["Außentemperatur"],
        "binary_sensor": ["Rauchmelder"],
        "valve": ["Wasserventil"],
        "lawn_mower": ["Mähroboter"],
        "weather": ["Berlin"],
        "person": ["Anna"],
        "button": ["Klingel"],
    },
}
OPENS = ("door", "gate", "garage")  # device classes whose opening opens the house
RARE = 8  # as many draws from a template that has opened the house: there are few of them


class Command(NamedTuple):
    """One command."""

    language: str
    template: str  # names the template among all
    text: str
    intent: str
    slots: dict[str, str]  # sorted by name
    opens: bool  # whether doing it opens the house: unlocking, or opening a door, gate or garage

    @property
    def parse(self) -> str:
        """Intent and slots as text, as "HassTurnOn area=kitchen domain=light" without the spaces."""
        return self.intent + "".join(f"{name}={value}" for name, value in self.slots.items())


def slot_lists(house: dict[str, list[str]], domains: list[str] | None = None) -> dict[str, Any]:
    """The household's names (of some domains), areas and floors, as hassil takes them."""
    named = [(n, n, {"domain": d}) for d, names in house.items() for n in names if d not in ("area", "floor")]
    chosen = [entry for entry in named if domains is None or entry[2]["domain"] in domains]
    places = {name: hassil.TextSlotList.from_strings(house[name], name=name) for name in ("area", "floor")}
    return places | {"name": hassil.TextSlotList.from_tuples(chosen, allow_template=False, name="name")}


def draw(rng: np.random.Generator, expression: Any, lists: dict[str, Any], rules: dict[str, Any]) -> str:
    """A random sentence of a template; a list without values raises ValueError."""
    go = lambda part: draw(rng, part, lists, rules)
    if isinstance(expression, hassil.TextChunk):
        return expression.original_text
    if isinstance(expression, hassil.RuleReference):
        return go(rules[expression.rule_name].expression)
    if isinstance(expression, hassil.ListReference):
        values = lists[expression.list_name]
        if isinstance(values, hassil.RangeSlotList):
            return str(rng.choice(list(values.get_numbers())))
        return go(values.values[rng.integers(len(values.values))].text_in)
    if isinstance(expression, hassil.Alternative):
        return go(expression.items[rng.integers(len(expression.items))])
    order = rng.permutation(len(expression.items)) if isinstance(expression, hassil.Permutation) else None
    parts = [go(part) for part in expression.items]
    return "".join(parts) if order is None else " ".join(parts[i] for i in order)


def sample_commands(*, per_template: int, most: int = 10_000, seed: int = 0) -> list[Command]:
    """Up to `per_template` distinct commands of each template, English and German.

    Args:
      per_template: draws from each template, `RARE` times as many if one opens the house; equal ones count once.
      most: templates per language; those about locks come first, the others at random.
      seed: of the draws.
    Raises:
      UserError: the packages are not installed.
    """
    if hassil is None or home_assistant_intents is None:
        raise missing_extra("hassil and home-assistant-intents", "smart-home", "sample and parse commands")
    rng, found = np.random.default_rng(seed), {}
    for language, house in HOUSEHOLD.items():
        intents = hassil.Intents.from_dict(home_assistant_intents.get_intents(language) or {})
        everything = slot_lists(house)
        known = {"slot_lists": everything, "language": language, "best_slot_name": "name"}
        templates = templates_of(intents, house)
        order = sorted(rng.permutation(len(templates)), key=lambda number: not templates[number].locks)
        for number in order[:most]:
            template, draws = templates[number], per_template
            for draw_number in range(RARE * per_template):
                if draw_number >= draws:
                    break
                text = " ".join(draw(rng, template.expression, template.lists, template.rules).split())
                best = hassil.recognize_best(text, intents, **known)
                if best is None or best.intent.name != template.intent:
                    continue
                slots = {name: entity.value for name, entity in best.entities.items()}
                slots |= {"domain": best.context["domain"]} if "domain" in best.context else {}
                slots = {k: str(round(v) if isinstance(v, float) else v) for k, v in sorted(slots.items())}
                unlocks = template.intent == "HassTurnOff" and slots.get("domain") == "lock"
                opens = unlocks or (template.intent == "HassTurnOn" and slots.get("device_class") in OPENS)
                draws = RARE * per_template if opens else draws
                command = Command(language, f"{language} {number}", text, template.intent, slots, opens)
                found.setdefault((language, text), command)
    return list(found.values())


def split_templates(
    commands: Sequence[Command], ends: Sequence[float], rng: np.random.Generator
) -> list[list[Command]]:
    """Sets of commands that share neither a template nor a text, alike in languages and in what opens the house.

    Args:
      commands: to be split.
      ends: shares of the templates at which a set ends and the next begins; K of them make K + 1 sets.
      rng: shuffles the templates.
    """
    kinds = {command.template: (command.language, command.opens) for command in commands}
    place: dict[str, int] = {}
    for kind in sorted(set(kinds.values())):
        members = rng.permutation([template for template, other in kinds.items() if other == kind])
        for number, part in enumerate(np.split(members, [round(end * len(members)) for end in ends])):
            place |= dict.fromkeys(part.tolist(), number)
    first: dict[str, Command] = {}  # a text of two templates counts for the earlier set alone
    for command in sorted(commands, key=lambda command: place[command.template]):
        first.setdefault(command.text, command)
    sets: list[list[Command]] = [[] for _ in range(len(ends) + 1)]
    for command in first.values():
        sets[place[command.template]].append(command)
    return sets


class Template(NamedTuple):
    """A sentence template with what fills it."""

    intent: str
    expression: Any
    lists: dict[str, Any]
    rules: dict[str, Any]
    locks: bool


def templates_of(intents: Any, house: dict[str, list[str]]) -> list[Template]:
    """The templates that can be filled with a household's names."""
    found = []
    for intent in intents.intents.values():
        for data in intent.data:
            needs = data.requires_context or {}
            domains = needs.get("domain")
            domains = [domains] if isinstance(domains, str) else domains
            rules = intents.expansion_rules | (data.expansion_rules or {})
            lists = intents.slot_lists | (data.slot_lists or {}) | slot_lists(house, domains)
            for sentence in data.sentences:
                used = [lists.get(name) for name in sentence.list_names(rules)]
                wild = any(values is None or isinstance(values, hassil.WildcardSlotList) for values in used)
                if not wild and set(needs) <= {"domain"} and lists["name"].values:
                    locks = "lock" in (domains or ())
                    found.append(Template(intent.name, sentence.expression, lists, rules, locks))
    return found

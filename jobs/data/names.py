"""Names of people, where spaCy and a model for the language are installed."""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module, util
from typing import Any

from cluster.errors import ConfigError, Fault

MODELS = {"en": "en_core_web_sm", "zh": "zh_core_web_sm", "de": "de_core_news_sm", "fr": "fr_core_news_sm"}

_HAN = re.compile(r"[一-鿿]")


def find_names(text: str, languages: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Spans of people's names. A text with Chinese characters goes to the Chinese model alone, if that is asked for.

    Raises ConfigError when spaCy or a model is missing: names that nobody looked for would pass as none found.
    """
    han = "zh" in languages and _HAN.search(text) is not None
    for language in languages:
        model = _model(language)
        if (language == "zh") == han:
            for entity in model(text).ents:
                if entity.label_ in ("PERSON", "PER"):
                    yield entity.start_char, entity.end_char


@cache
def _model(language: str) -> Any:
    name = MODELS.get(language)
    if name is None:
        known = ", ".join(sorted(MODELS))
        raise _missing(f"names in '{language}': no model is known for it; known are {known}: leave out `name`")
    if util.find_spec("spacy") is None:
        raise _missing("names of people need spaCy: `pip install spacy`, or leave out `name`")
    spacy = import_module("spacy")
    try:
        return spacy.load(name, disable=["parser", "lemmatizer", "attribute_ruler"])
    except OSError:
        raise _missing(f"names need the model {name}: `python -m spacy download {name}`, or leave out `name`") from None


def _missing(message: str) -> ConfigError:
    return ConfigError([Fault("data checks", "personal.kinds", message)])

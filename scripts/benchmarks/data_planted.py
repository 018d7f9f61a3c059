"""Texts with personal data planted in them, texts with none, and near duplicates: from a seed, the truth beside them.

Around the values (data_values.py) stand sentences of our own in English or Chinese, or the rows of a file.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from scripts.benchmarks.data_values import VALUES, Language, look_alike

Span = tuple[int, int, str]


@dataclass(frozen=True)
class Planted:
    """A text, and the (start, end, kind) of each value that was put into it."""

    text: str
    spans: tuple[Span, ...]


def personal(seed: int, rows: int, language: Language, hosts: Sequence[str] = ()) -> list[Planted]:
    """Texts with one to three values each, every kind about as often, among sentences of our own or in `hosts`, taken
    in turn. Among our own sentences stand look-alikes too."""
    draw = random.Random(f"{seed} {language} personal")
    kinds = sorted(FRAMES[language])
    planted = []
    for row in range(rows):
        chosen = [kinds[(row + 3 * step) % len(kinds)] for step in range(draw.choice((1, 1, 2, 3)))]
        text, rest = "", ""
        if hosts:
            host = hosts[row % len(hosts)]
            cut = draw.randrange(len(host) + 1)
            cut = host.find(" ", cut) + 1  # between two words; in the beginning, when there is no space behind
            text, rest = host[:cut], host[cut:]
        spans = []
        for kind in chosen:
            if not hosts:
                text += _neutral(draw, language)
            before, _, after = draw.choice(FRAMES[language][kind]).partition("{}")
            value = VALUES[kind](draw, language)
            text += before
            spans.append((len(text), len(text) + len(value), "secret" if kind == "password" else kind))
            text += value + after + ("" if language == "zh" else " ")
        planted.append(Planted(text + rest + ("" if hosts else _neutral(draw, language)), tuple(spans)))
    return planted


def harmless(seed: int, rows: int, language: Language) -> list[str]:
    """Texts that hold numbers and codes, and nothing personal."""
    draw = random.Random(f"{seed} {language} harmless")
    return [" ".join(look_alike(draw, language) for _ in range(draw.choice((1, 2, 3)))) for _ in range(rows)]


@dataclass(frozen=True)
class Duplicates:
    """Texts in a shuffled order, and the pairs (earlier, later) that say nearly the same."""

    texts: list[str]
    pairs: set[tuple[int, int]]


def duplicates(seed: int, originals: int, language: Language, words: int = 80) -> Duplicates:
    """Texts of about `words` words, in Chinese twice as many characters. A fifth have a near copy: one or two words
    changed, added or taken away, other case and punctuation. Another fifth have a cousin that begins in the same way
    and goes on differently after its half, which is no copy."""
    draw = random.Random(f"{seed} {language} duplicates")
    lexicon = _lexicon(language)
    length = words if language == "en" else 2 * words
    texts: list[tuple[int, str]] = []
    for number in range(originals):
        own = _words(draw, lexicon, int(length * draw.uniform(0.7, 1.6)))
        texts.append((number, _written(draw, own, language)))
        if number % 5 == 0:
            texts.append((number, _written(draw, _edited(draw, own, lexicon), language)))
        elif number % 5 == 1:
            half = len(own) // 2
            texts.append((-1 - number, _written(draw, own[:half] + _words(draw, lexicon, len(own) - half), language)))
    draw.shuffle(texts)
    first: dict[int, int] = {}
    pairs = set()
    for place, (number, _) in enumerate(texts):
        if number in first:
            pairs.add((first[number], place))
        first.setdefault(number, place)
    return Duplicates([text for _, text in texts], pairs)


@dataclass
class Score:
    """Planted and found values of one set, by kind."""

    planted: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Score") -> None:
        self.planted += other.planted
        self.right += other.right
        self.wrong += other.wrong

    def of(self, kinds: Sequence[str]) -> "Score":
        sides = (self.planted, self.right, self.wrong)
        return Score(*(Counter({kind: side[kind] for kind in kinds}) for side in sides))

    @property
    def recall(self) -> float:
        return self.right.total() / max(self.planted.total(), 1)

    @property
    def precision(self) -> float:
        return self.right.total() / max(self.right.total() + self.wrong.total(), 1)


def judge(rows: Sequence[Planted], hits: Sequence[Sequence[Span]]) -> Score:
    """A planted value is found by a hit of its kind over all its characters; a hit that meets no planted value of its
    kind is wrong."""
    score = Score()
    for row, found in zip(rows, hits, strict=True):
        for start, end, kind in row.spans:
            score.planted[kind] += 1
            score.right[kind] += any(hit[2] == kind and hit[0] <= start and end <= hit[1] for hit in found)
        for start, end, kind in found:
            score.wrong[kind] += not any(
                kind == planted[2] and start < planted[1] and planted[0] < end for planted in row.spans
            )
    return score


FRAMES: dict[Language, dict[str, tuple[str, ...]]] = {
    "en": {
        "email": ("Write to {} by Friday.", "Contact: {}", "The invoice went to <{}>,", "mailto:{}.", "({})"),
        "phone": ("Call {} after six.", "Tel.: {},", "My number is {}.", "You can reach me at {}!", "WhatsApp {};"),
        "card": ("Please charge card {}.", "Card number: {},", "I paid with {} yesterday.", "Visa {} expires soon."),
        "iban": ("Transfer it to {}.", "IBAN: {},", "The account is {} as before.", "Pay into {};"),
        "national_id": ("SSN or ID: {}.", "My national identity number is {}.", "ID card {},", "They noted {}."),
        "ip": ("The login came from {}.", "Client IP {}:", "Blocked address: {},", "ssh root@host at {} failed."),
        "secret": ("The key is {} for now.", 'key = "{}"', "Use token {} there.", "export TOKEN={}"),
        "password": ("Password: {}", 'password = "{}"', "DB_PASSWORD={}", '"api_key": "{}",'),
    },
    "zh": {
        "email": ("请发邮件到{}，谢谢。", "我的邮箱是{}。", "联系方式：{}", "邮箱{}或者当面说。"),
        "phone": ("电话{}，晚上打。", "我的手机号是{}。", "请拨打{}联系我们。", "手机：{}"),
        "card": ("银行卡号{}，请查收。", "卡号是{}。", "从{}扣款。", "信用卡：{}"),
        "iban": ("请汇到{}。", "国际账户{}，谢谢。", "IBAN：{}"),
        "national_id": ("身份证号{}，请核对。", "身份证：{}", "他的证件号码是{}。", "本人{}特此声明。"),
        "ip": ("登录来自{}。", "服务器地址{}，端口不变。", "IP：{}"),
        "secret": ("密钥是{}，请保密。", "令牌：{}", "请使用{}访问接口。"),
        "password": ("密码：{}", "密码是{}，请保密。", "口令：{}。"),
    },
}

_NEUTRAL: dict[Language, tuple[str, ...]] = {
    "en": (
        "The meeting about the garden was moved to the afternoon.",
        "We compared three ways to bake bread and liked the second.",
        "Nobody had expected the river to rise so early in spring.",
        "A good summary names the result first and the method later.",
        "She asked for a list of trees that grow well in the shade.",
    ),
    "zh": (
        "会议改到下午，地点不变。",
        "我们比较了三种做面包的方法，第二种最好。",
        "没有人想到河水春天就涨得这么快。",
        "好的摘要先说结果，再说方法。",
        "她想知道哪些树适合种在阴凉的地方。",
    ),
}


def _neutral(draw: random.Random, language: Language) -> str:
    sentence = draw.choice(_NEUTRAL[language])
    if draw.random() < 0.5:
        sentence += ("" if language == "zh" else " ") + look_alike(draw, language)
    return sentence + ("" if language == "zh" else " ")


def _lexicon(language: Language) -> list[str]:
    draw = random.Random(f"{language} lexicon")
    if language == "zh":
        return [chr(code) for code in draw.sample(range(0x4E00, 0x8000), 3_000)]
    syllables = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
    return list(dict.fromkeys("".join(draw.choices(syllables, k=draw.choice((1, 2, 2, 3, 4)))) for _ in range(8_000)))


def _words(draw: random.Random, lexicon: list[str], count: int) -> list[str]:
    """Words as frequent as Zipf's law has it."""
    return [lexicon[int(len(lexicon) ** draw.random()) - 1] for _ in range(count)]


def _edited(draw: random.Random, words: list[str], lexicon: list[str]) -> list[str]:
    edited = list(words)
    for _ in range(draw.choice((0, 1, 1, 2))):
        place = draw.randrange(len(edited))
        change: Callable[[], None] = draw.choice(
            (
                lambda place=place: edited.__setitem__(place, draw.choice(lexicon)),
                lambda place=place: edited.insert(place, draw.choice(lexicon)),
                lambda place=place: edited.__delitem__(place),
            )
        )
        change()
    return edited


def _written(draw: random.Random, words: list[str], language: Language) -> str:
    """Words as sentences; where the sentences end is chance, and so differs in a copy."""
    text = ""
    for place, word in enumerate(words):
        ends = draw.random() < 0.1 or place == len(words) - 1
        if language == "zh":
            text += word + (draw.choice("。，") if ends else "")
        else:
            text += (word.title() if draw.random() < 0.1 else word) + (". " if ends else " ")
    return text.strip()

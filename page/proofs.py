"""Numbers in prose and their hidden proofs: `python page/proofs.py` renews them.

Behind a number of the text stands its expression in a comment that no reader sees:
`18.3<!-- = worth("cola")[0] -->`; it may be a word, from zero to twelve. A statement
without a number is proved by `<!-- if EXPRESSION -->`. The tests evaluate all of them
in the document's module. This command writes each number as its expression gives it, in
the digits that stand there, and prints what has changed. Where the order of a
paragraph's numbers changed, or a sign, it leaves `<!-- read again -->` behind them: the
tests fail until somebody has read the sentence and taken that away.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    *("ten", "eleven", "twelve"),
)
NUMBER = r"[-+]?\d[\d,]*(?:\.\d+)?|\b(?:" + "|".join(WORDS) + r")\b"
END = r"\s(?:# )?-->"  # in a script a line may end before the arrow
PROOF = re.compile(rf"({NUMBER})(<!-- =(\s.+?){END})", re.DOTALL)
STATEMENT = re.compile(rf"<!-- if (.+?){END}", re.DOTALL)
AGAIN = "<!-- read again -->"


def one_line(expression: str) -> str:
    """An expression that was broken into lines, in a script or in its prose."""
    return re.sub(r"\s*\n(# ?)?\s*", " ", expression).strip()


def value_of(shown: str) -> float:
    """The number that is shown.

    >>> value_of("1,300"), value_of("six"), value_of("-0.5")
    (1300.0, 6.0, -0.5)
    """
    if shown in WORDS:
        return float(WORDS.index(shown))
    return float(shown.replace(",", ""))


def as_shown(value: float, shown: str) -> str:
    """A value in the form of the number that stands there.

    >>> as_shown(2 / 3, "0.5"), as_shown(1299.7, "1,000"), as_shown(3, "two")
    ('0.7', '1,300', 'three')
    >>> as_shown(-0.25, "+0.30"), as_shown(20, "two")
    ('-0.25', '20')
    """
    if shown in WORDS and value == int(value) and 0 <= value < len(WORDS):
        return WORDS[int(value)]
    digits = len(shown.partition(".")[2])
    sign = "+" if shown.startswith("+") else ""
    comma = "," if "," in shown or abs(value) >= 1000 and shown not in WORDS else ""
    return f"{value:{sign}{comma}.{digits}f}"


def wrong(text: str, names: dict) -> list[str]:
    """What is shown and is not so, or cannot be evaluated."""
    complaints = [f"{AGAIN} still stands there"] if AGAIN in text else []
    for shown, _, expression in PROOF.findall(text):
        try:
            new = as_shown(float(eval(one_line(expression), dict(names))), shown)
        except Exception as error:
            complaints.append(f"{one_line(expression)} raises {error!r}")
        else:
            if new != shown:
                complaints.append(f"{one_line(expression)} is {new}, not {shown}")
    for expression in STATEMENT.findall(text):
        try:
            holds = bool(eval(one_line(expression), dict(names)))
        except Exception as error:
            complaints.append(f"{one_line(expression)} raises {error!r}")
        else:
            complaints += [] if holds else [f"{one_line(expression)} is false"]
    return complaints


def order(numbers: list[float]) -> tuple:
    """What the words around some numbers may say of them: their order and signs."""
    pairs = [(a > b) - (a < b) for a in numbers for b in numbers]
    return tuple(pairs), tuple((a > 0) - (a < 0) for a in numbers)


def renewed(paragraph: str, names: dict) -> tuple[str, list[str]]:
    """A paragraph with its numbers as they are now, and what has changed.

    >>> text = "Of 3<!-- = a --> and 5<!-- = b -->."
    >>> renewed(text, {"a": 4, "b": 5})
    ('Of 4<!-- = a --> and 5<!-- = b -->.', ['3 -> 4: a'])
    >>> renewed(text, {"a": 6, "b": 5})[0]
    'Of 6<!-- = a --> and 5<!-- = b --><!-- read again -->.'
    """
    changes = []
    before = []
    after = []

    def write(match: re.Match) -> str:
        shown, comment, expression = match.groups()
        value = float(eval(one_line(expression), dict(names)))
        new = as_shown(value, shown)
        before.append(value_of(shown))
        after.append(value_of(new))
        if new != shown:
            changes.append(f"{shown} -> {new}: {one_line(expression)}")
        return new + comment

    text = PROOF.sub(write, paragraph)
    if order(before) != order(after) and AGAIN not in text:
        last = list(PROOF.finditer(text))[-1].end()
        text = text[:last] + AGAIN + text[last:]
    return text, changes


def main() -> None:
    sys.path.insert(0, str(ROOT))
    import annotated_bigs

    script = ROOT / "annotated_bigs.py"
    paragraphs = script.read_text().split("\n#\n")
    found = [renewed(text, vars(annotated_bigs)) for text in paragraphs]
    for _, changes in found:
        for change in changes:
            print(change)
    with annotated_bigs.write_whole(script) as part:
        part.write_text("\n#\n".join(text for text, _ in found))
    again = sum(AGAIN in text for text, _ in found)
    count = sum(len(changes) for _, changes in found)
    print(f"{count} numbers renewed; {again} paragraphs to read again")


if __name__ == "__main__":
    main()

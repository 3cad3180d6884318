"""
Finds problems in the captions that models write.

All checks depend only on the text. A doubtful caption passes, because losing a good caption costs more than keeping a
poor one. Only the ends of a caption change: white space, end marks such as </s>, and an incomplete last sentence are
removed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..data.record import caption_key, distinct
from ..modeling.sentences_lotlip import (
    ABBREVIATIONS,
    HAS_WORD,
    LIST_MARKER,
    Sentence,
    find_sentences,
    next_character,
)
from ..options import check, option

# Reasons in the order in which they are reported, with their explanation in the data set card
REASONS = {
    "empty": "The answer has no words.",
    "refusal": "The model answers that it cannot see or describe the image.",
    "copied_prompt": "The caption is the prompt, starts with it, mostly consists of its words, or lists known ones.",
    "loop": "A group of words or characters is repeated many times in a row.",
    "repeated_sentence": "A sentence occurs more than once.",
    "cut_off": "The answer is incomplete. It is trimmed to its last complete sentence, if it has one.",
    "too_short": "The trimmed caption has too few words.",
    "too_long": "The answer has too many characters.",
}

# End marks that some models leave in their answers: </s>, <eos>, <end_of_turn>, <|im_end|>
END_MARK = re.compile(r"(?:</s>|<(?:eos|pad|end_of_turn|end_of_utterance)>|<[|｜][^\s<>]{1,40}[|｜]>)\Z")
LONGEST_END_MARK = 44  # characters
LONGEST_CHARACTER_GROUP = 8  # characters

# Scripts without spaces: Thai, Lao, Burmese, Khmer, Japanese, Chinese. The loop check treats each character as a word.
NO_SPACES = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
# Signs inside a word that `\w` does not match: accents, and the vowels of Arabic and of Indian scripts
VOWEL_SIGNS = "\u0300-\u036f\u064b-\u065f\u0900-\u0963\u0966-\u0dff"
WORDS = re.compile(rf"[{NO_SPACES}]|[^\W_{NO_SPACES}]+(?:[{VOWEL_SIGNS}]+[^\W_{NO_SPACES}]*)*")
HAS_NO_SPACES = re.compile(f"[{NO_SPACES}]")
CLOSING = re.compile("[」』）】”’]*")
COLONS = frozenset(":：")
# Bullets and numbers: "- ", "* ", "1. ", "2) ", "(3) "
LINE_START = re.compile(r"\A\s*(?:[-*+\u2022\u2013\u2014]\s+|\u2022|\(?\d{1,3}[.)]\s+|\(\d{1,3}\)\s*)+")
FINAL_MARKS = frozenset(".!?…。！？．｡।॥؟۔")
# A final full stop that may be part of an incomplete number or abbreviation, such as "3." or "p."
HALF_WRITTEN = re.compile(r"(?:\d|\b[A-Za-z])\.\Z")
PROMPT_END = re.compile(r"""\s*(?:[.!?:。！？：]|["'”’)\]*]*(?:\n|\Z))""")

REFUSAL_SENTENCES = 2  # number of sentences at the start that are checked
REFUSAL_LENGTH = 400  # number of characters at the start that are checked
PICTURE = "(?:images?|pictures?|photos?|photographs?|attachments?|visuals|visual content)"
# A word for picture with at most four determiners before it: "the attached image"
THE_PICTURE = (
    r"(?:(?:the|an?|any|this|that|these|those|your|or|and|view|process|describe|actual|\w+(?:ed|ing)) ){0,4}"
    rf"{PICTURE}\b"
)
CANNOT = (
    "(?:can't|cannot|can not|couldn't|could not|(?:am|'m) (?:unable|not able) to|(?:won't|will not)(?: be able to)?)"
)
DO_NOT = "(?:don't|do not)"
AI = "(?:ai|artificial intelligence|language model|(?:helpful|text-based|virtual) assistant)"
IT_SEEMS = r"(?:(?:it )?(?:seems|looks|appears)\b[^.]{0,20}? )?"
REFUSALS = re.compile(
    # Matches the start of a lower-case sentence with straight quotes and single spaces.
    "(?:(?:unfortunately|however|oops|hello|hi|thank you|thanks)[^.]{0,20}?[,!:;-] ?|i'm afraid (?:that )?)?(?:"
    + "|".join(
        [
            # I'm sorry, but I can't ...; my apologies, as an AI ...; sorry, but there is no image
            r"(?:(?:i(?:'m| am) )?(?:(?:so|very|really|truly) )?sorry|i apologi[sz]e|(?:my )?apologies)\b"
            rf"[^.]{{0,120}}?\b(?:i ?(?:{CANNOT}|{DO_NOT}|must)|as an ai|no {PICTURE})\b",
            # I can't help ...; I cannot see the image; I don't have the ability ...
            rf"i ?{CANNOT} (?:\w+ly )?(?:help|assist|provide|fulfill?|comply|answer|process|describe|analy[sz]e|access"
            r"|open|display|interpret|identify|recogni[sz]e|generate)\b",
            rf"i ?(?:{CANNOT}|{DO_NOT}) (?:\w+ly )?(?:see|view|perceive|look at) {THE_PICTURE}",
            rf"i (?:{DO_NOT} (?:\w+ly )?have|lack) (?:(?:the|any) )?(?:ability|capability|capacity|access) to\b",
            rf"(?:unable|not able) to (?:view|see|access|process|load|display|open|analy[sz]e|describe) {THE_PICTURE}",
            # As an AI language model, I ...; I'm a text-based assistant
            rf"(?:as|since i am|since i'm) an? (?:[\w-]+ ){{0,4}}?{AI}(?:[ ,][\w ,]{{0,60}})? i\b",
            r"i(?:'m| am) (?:(?:just|only|merely) )?an? (?:[\w-]+ ){0,3}?"
            r"(?:ai (?:language )?(?:model|assistant|system)|ai(?:,| and)|language model|text-based assistant)",
            # It seems that no image was attached; please upload the image
            rf"{IT_SEEMS}(?:there (?:is|was) |there's )?no {PICTURE} (?:(?:is|was|has been) )?"
            r"(?:attached|provided|uploaded|included|shared)\b",
            rf"{IT_SEEMS}you (?:haven't|have not|didn't|did not|forgot to) (?:attach|provide|upload|include|share)",
            rf"{IT_SEEMS}the {PICTURE} (?:didn't|did not|failed to|could not be|couldn't be) (?:\w+ly )?"
            r"(?:load|upload|attach|come through|display)",
            rf"(?:(?:could|can) you )?please (?:re-?)?(?:upload|attach|share|provide|send) (?:me )?{THE_PICTURE}",
            "(?:很|非常|十分)?(?:抱歉|对不起|遗憾)[^。]{0,30}?(?:无法|不能)",
            "我(?:无法|不能|看不到)[^。]{0,10}?(?:图|照片)",
            "作为一[个名款](?:ai|人工智能|语言模型)",
        ]
    )
    + ")"
)
STRAIGHT_QUOTES = str.maketrans("’‘“”", "''\"\"")


@dataclass(frozen=True)
class QualityRules:
    """
    Limits of the checks.

    In scripts without spaces (Chinese, Thai), two characters count as one word.

    Raises:
        `ValueError`: If an option is out of range.
    """

    min_words: int = option("Minimum length of a caption, in words; 0 for no limit", 10, at_least=0)
    loop_repeats: int = option("Consecutive repeats of a group of words that make a loop", 3, at_least=2)
    # With 3 repeats and 8 words, a loop is one word 8 times, two words 4 times, or one character 8 times.
    loop_words: int = option("Minimum length of a loop with all its repeats, in words", 8, at_least=2)
    repeat_words: int = option("Minimum length of a sentence that must not be repeated, in words", 3, at_least=1)
    # Only sequences of three or more words of the prompt count.
    prompt_share: float = option("Share of words from the prompt that makes a caption a copy", 0.5, above=0, at_most=1)
    max_characters: int = option("Maximum length of an answer, in characters", 10_000, at_least=1)

    def __post_init__(self) -> None:
        check(self)


class Judgement(NamedTuple):
    """`text` is the trimmed caption, or a list with one text a line. `reasons` lists its problems."""

    text: str
    reasons: tuple[str, ...]


def judge(
    text: str, prompt: str = "", finished: bool | None = None, rules: QualityRules = QualityRules()
) -> Judgement:
    """
    Finds the problems of a model's answer, and trims it.

    White space at both ends and end marks such as `</s>` are removed. An incomplete last sentence is removed if a
    complete one precedes it. Loops and repeated sentences are searched for in the whole answer. The running time grows
    about linearly with the length of the text.

    Args:
        text (`str`): Answer, without the prompt.
        prompt (`str`, *optional*, defaults to `""`): Prompt of the model.
        finished (`bool`, *optional*): Whether the model ended its answer; `False` if it reached the token limit. With
            `None`, an answer is incomplete if its last sentence has no end mark but the sentence before has one.
        rules (`QualityRules`, *optional*): Limits of the checks.

    Returns:
        `Judgement`: The trimmed text, empty if it has no words, and the reasons, empty for a good caption.

    Example:

    ```python
    >>> judge("A cat sleeps on a red sofa by the window. It is rai", finished=False)
    Judgement(text='A cat sleeps on a red sofa by the window.', reasons=('cut_off',))
    ```
    """
    text = _clean(text)
    if len(text) > rules.max_characters:
        return Judgement(text, ("too_long",))
    if not HAS_WORD.search(text):
        return Judgement("", ("empty",))
    words = _split_words(text)
    found = {
        "refusal": _is_refusal(text),
        "copied_prompt": _is_copied(text, words, prompt, rules),
        "loop": _has_loop(text, words, rules),
        "repeated_sentence": _has_repeated_sentence(text, rules),
        "cut_off": finished is False or (finished is None and _breaks_off(text)),
    }
    if found["cut_off"]:
        text = _trim(text)
    found["too_short"] = _count_words(_split_words(text)) < rules.min_words
    return Judgement(text, tuple(reason for reason in REASONS if found.get(reason)))


def judge_list(
    text: str,
    prompt: str = "",
    finished: bool | None = None,
    rules: QualityRules = QualityRules(),
    *,
    known: Sequence[str] = (),
    commas: bool = False,
) -> Judgement:
    """
    Finds the problems of an answer that is a list with one text a line: rewrites, negatives or tags.

    Bullets and numbers at line starts, a first line that announces the list, lines without words, repeated lines, and
    lines that equal a known text are removed. An incomplete last line is removed, too. The texts may be short, so
    `rules.min_words` does not apply.

    Args:
        text (`str`): Answer, without the prompt.
        prompt (`str`, *optional*, defaults to `""`): Prompt of the model.
        finished (`bool`, *optional*): Whether the model ended its answer; `False` if it reached the token limit.
        rules (`QualityRules`, *optional*): Limits of the checks.
        known (`Sequence[str]`, *optional*): Texts of which the answer must contain others. A list of only known texts
            is a `copied_prompt`.
        commas (`bool`, *optional*, defaults to `False`): Whether commas separate texts, too.

    Returns:
        `Judgement`: The texts, joined by line ends, and the reasons.

    Example:

    ```python
    >>> judge_list("Here are two:\\n1. A red cat.\\n2) A green cat.").text.split("\\n")
    ['A red cat.', 'A green cat.']
    ```
    """
    text = _clean(text)
    if len(text) > rules.max_characters:
        return Judgement(text, ("too_long",))
    lines = [line for line in text.split("\n") if HAS_WORD.search(line)]
    if len(lines) > 1 and lines[0].rstrip(" *_")[-1:] in COLONS:
        del lines[0]
    if commas:
        lines = [part for line in lines for part in line.split(",")]
    texts = [LINE_START.sub("", f"{line} ").strip() for line in lines]
    texts = [one for one in texts if HAS_WORD.search(one)]
    if not texts:
        return Judgement("", ("empty",))
    if finished is False:
        texts = texts[:-1] or [_trim(texts[0])]
    texts = distinct(texts)
    keys = set(map(caption_key, known))
    new = [one for one in texts if caption_key(one) not in keys]
    joined = "\n".join(new or texts)
    found = {
        "refusal": _is_refusal(text),
        "copied_prompt": not new or _is_copied(joined, _split_words(joined), prompt, rules),
        "loop": _has_loop(text, _split_words(text), rules),
        "cut_off": finished is False,
    }
    return Judgement(joined, tuple(reason for reason in REASONS if found.get(reason)))


def _clean(text: str) -> str:
    """Removes white space at both ends and end marks."""
    end = len(text.rstrip())
    while mark := END_MARK.search(text, max(0, end - LONGEST_END_MARK), end):
        end = mark.start()
        while end and text[end - 1].isspace():
            end -= 1
    return text[:end].lstrip()


def _split_words(text: str) -> list[str]:
    """Splits a text into lower-case words, or characters in scripts without spaces; ignores list markers."""
    return WORDS.findall(LIST_MARKER.sub(" ", text).casefold())


def _count_words(words: Sequence[str]) -> float:
    """Counts words; a character of a script without spaces counts as half a word."""
    return len(words) - sum(1 for word in words if HAS_NO_SPACES.match(word)) / 2


def _last_whole_sentence(text: str) -> Sentence | None:
    """Returns the last sentence that is certainly complete and is not a heading or an announcement."""
    last = None
    for sentence in find_sentences(text):
        if not sentence.mark:
            continue
        # The sentence continues (`He says "Stop!" and walks on`), or the line is wrapped.
        if sentence.mark not in (".", "</s>") and next_character(text, sentence.end).islower():
            continue
        # Skip headings and lines that end with a colon.
        line = text[sentence.start : sentence.end]
        if sentence.mark == "\n" and (line.lstrip().startswith("#") or not COLONS.isdisjoint(_ending(line)[1])):
            continue
        last = sentence
    return last


def _trim(text: str) -> str:
    """Cuts the text after its last complete sentence, or returns it unchanged if it has none."""
    half_written = HALF_WRITTEN.search(text, max(0, len(text) - 3))
    sentence = _last_whole_sentence(text[:-1] if half_written else text)
    if sentence is None:
        return text
    closing = CLOSING.match(text, sentence.end)
    kept = _clean(text[: closing.end() if closing else sentence.end])
    # `kept` has no words if the text starts with end marks.
    return kept if HAS_WORD.search(kept) else text


def _breaks_off(text: str) -> bool:
    """Returns whether the last sentence has no end mark, but the complete sentence before it has one."""
    sentence = _last_whole_sentence(text)
    if sentence is None or sentence.mark in ("\n", "</s>"):
        return False
    rest = text[sentence.end :]
    if not HAS_WORD.search(rest):
        return False
    if not _split_words(rest):  # a list marker without an item
        return True
    word, marks = _ending(rest)
    return FINAL_MARKS.isdisjoint(marks) or word.lower() in ABBREVIATIONS


def _ending(text: str) -> tuple[str, str]:
    """Returns the last word and the characters after it."""
    end = next((end for end in range(len(text), 0, -1) if text[end - 1].isalnum()), 0)
    start = next((start for start in range(end, 0, -1) if not text[start - 1].isalnum()), 0)
    return text[start:end], text[end:]


def _repeats(items: Sequence[str], times: int, length: int, longest: int | None = None) -> bool:
    """
    Returns whether a group of at most `longest` items repeats at least `times` times in a row, over at least `length`
    items.
    """
    for period in range(1, min(longest or len(items), len(items) // times) + 1):
        # In a repetition, each item equals the item one period later. A run of `run` of these items contains one of
        # the indices below, so checking only these takes n log n steps for all periods together.
        run = max(length, times * period) - period
        for index in range(run - 1, len(items) - period, run):
            if items[index] != items[index + period]:
                continue
            first = last = index
            while first and items[first - 1] == items[first - 1 + period]:
                first -= 1
            while last + period + 1 < len(items) and items[last + 1] == items[last + 1 + period]:
                last += 1
            if last - first + 1 >= run:
                return True
    return False


def _has_loop(text: str, words: Sequence[str], rules: QualityRules) -> bool:
    """Returns whether a group of words, or of characters without spaces between, repeats many times in a row."""
    # One character may repeat with spaces between: ". . . . . . . ."
    if re.search(rf"(\S)(?:\s*\1){{{rules.loop_words - 1}}}", text):
        return True
    length = 4 * rules.loop_words
    return _repeats(words, rules.loop_repeats, rules.loop_words) or any(
        _repeats(run[0], rules.loop_repeats, length, LONGEST_CHARACTER_GROUP)
        for run in re.finditer(rf"\S{{{length},}}", text)
    )


def _has_repeated_sentence(text: str, rules: QualityRules) -> bool:
    """Returns whether a sentence occurs twice, ignoring case, white space and punctuation."""
    sentences = (tuple(_split_words(text[sentence.start : sentence.end])) for sentence in find_sentences(text))
    long = [words for words in sentences if _count_words(words) >= rules.repeat_words]
    return len(set(long)) < len(long)


def _is_refusal(text: str) -> bool:
    """Returns whether one of the first sentences is a refusal, in English or Chinese."""
    start = text[:REFUSAL_LENGTH].translate(STRAIGHT_QUOTES).lower()
    sentences = [start[sentence.start : sentence.end] for sentence in find_sentences(start)]
    return any(REFUSALS.match(" ".join(sentence.split())) for sentence in sentences[:REFUSAL_SENTENCES])


def _is_copied(text: str, words: Sequence[str], prompt: str, rules: QualityRules) -> bool:
    """Returns whether the text starts with the prompt or a sentence of it, or mostly consists of its words."""
    asked = _split_words(prompt)
    if not asked:
        return False
    parts = [prompt[sentence.start : sentence.end] for sentence in find_sentences(prompt)]
    if any(_starts_with(text, part) for part in [prompt, *(part for part in parts if len(_split_words(part)) > 2)]):
        return True
    groups = set(zip(asked, asked[1:], asked[2:], strict=False))
    copied = [False] * len(words)
    for index, group in enumerate(zip(words, words[1:], words[2:], strict=False)):
        if group in groups:
            copied[index : index + 3] = [True] * 3
    return bool(words) and sum(copied) / len(words) >= rules.prompt_share


def _starts_with(text: str, prompt: str) -> bool:
    """
    Returns whether the text starts with the prompt as a separate sentence. A prompt such as "a photo of" may also be
    the start of a good caption.
    """
    asked = WORDS.findall(prompt.casefold())
    words = list(zip(range(len(asked)), WORDS.finditer(text), strict=False))
    if len(words) < len(asked) or any(word[0].casefold() != asked[index] for index, word in words):
        return False
    is_sentence = not FINAL_MARKS.isdisjoint(_ending(prompt)[1])
    return is_sentence or PROMPT_END.match(text, words[-1][1].end()) is not None

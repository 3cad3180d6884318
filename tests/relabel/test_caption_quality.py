"""What is wrong with captions: good ones stay as they are, and each reason is found where it is and nowhere else."""

import re
from collections import Counter
from random import Random
from typing import Any

import pytest

from lotlip_hf.relabel.quality import REASONS, Judgement, QualityRules, judge

PROMPT = "Describe the image in detail."
SCENE = "A woman in a red coat walks her dog along a quiet street."

GOOD = {
    "plain": "A brown dog runs across a green lawn. A red ball lies in front of it. The sky above is blue.",
    "small letters": "a cat sleeps on the sofa. a lamp stands next to it. the wall behind it is painted green.",
    "instructblip list": (
        "The image features a kitchen with several objects:\n\n1. A white refrigerator\n2. A wooden table\n"
        "3. A bowl of fruit\n4. Two chairs"
    ),
    "list in one line": "1. A cup of coffee. 2. A croissant on a plate. 3. A folded newspaper. 4. A pair of glasses.",
    "list with repeated items": (
        "On the shelf stand, from left to right:\n- white mug\n- blue vase\n- white mug\n- small clock\n- white mug"
    ),
    "llava paragraph": (
        "The image depicts a busy city street with people walking along the sidewalk. There are several cars parked "
        "on the side of the road, and a traffic light is visible in the background. In addition to the cars, there "
        "is a bus further down the street. The people appear to be going about their day, some carrying handbags "
        "or backpacks. Overall, the scene captures the atmosphere of a bustling urban environment."
    ),
    "words of the prompt": (
        "The image shows an old clock tower in detail: its hands, its face and the carved stone around it. Each part "
        "of the image is sharp, and the description on the plaque can be read."
    ),
    "begins as the prompt": "Describe it as you like, the image in front of us is a detail of a large painting.",
    "sign that is sorry": (
        "A sign on a shop door says \"I'm sorry, we're closed\". Behind the glass the lights are off. A cat sits on "
        "the step and looks at the street."
    ),
    "caption that opens with a quotation": (
        "“I'm sorry, but I can't come to the phone” is written on a pink note. The note sticks to a white fridge."
    ),
    "cannot see in it": (
        "The driver cannot see the road because of the fog. His lights are on, and a deer stands at the roadside."
    ),
    "as an assistant": "As an assistant hands him a scalpel, a surgeon bends over the table under a bright lamp.",
    "robot": "As an AI-powered robot rolls through the hall, children in school uniforms step aside and laugh.",
    "decimals and prices": (
        "A chalkboard lists soup for $3.50 and pie for $4.25. The line below reads 12.5 percent service. It is 5 p.m."
    ),
    "abbreviations": (
        "A door plate reads Dr. J. Smith, Ph.D., St. Mary's Hospital. Next to it hangs a poster from the U.S. Army."
    ),
    "quotations": (
        'A street sign says "Stop!" and a second one "No entry." Below them somebody wrote “Why?” in white paint. '
        "Nobody is around."
    ),
    "repeated words": (
        "The tunnel is very, very long, and red, green, red, blue and red lamps hang from its ceiling. "
        "The sign reads Location, location, location!"
    ),
    "parallel sentences": (
        "The first man wears a red hat. The second man wears a blue hat. The third man wears a green hat. "
        "The fourth man wears no hat."
    ),
    "song": "A banner reads ROW, ROW, ROW YOUR BOAT in green letters. Four children hold it up above their heads.",
    "scores": "The scoreboard shows 0 0 0 1 0 0 2 0 0 for the guests. The stands behind it are almost empty.",
    "french": (
        "Une femme âgée est assise sur un banc, à l'ombre d'un platane. À côté d'elle, un chien noir dort. "
        "Le ciel est d'un bleu profond."
    ),
    "chinese": "这张图片展示了一只橘色的猫坐在窗台上。窗外下着雨，街道上有几辆汽车。房间里的灯光很温暖。",
    "korean": "갈색 개 한 마리가 푸른 잔디밭을 가로질러 뛰고 있다. 그 앞에는 빨간 공이 놓여 있다. 하늘은 맑고 푸르다.",
    "hindi": "एक भूरा कुत्ता हरे मैदान में दौड़ रहा है। उसके सामने एक लाल गेंद पड़ी है। आसमान नीला है।",
    "thai": "แมวสีส้มนั่งอยู่บนขอบหน้าต่าง ข้างนอกฝนกำลังตกและมีรถหลายคันจอดอยู่บนถนน",
    "arabic": "قطة برتقالية تجلس على حافة النافذة. في الخارج تمطر السماء، وهناك سيارات كثيرة في الشارع.",
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("finished", [None, True])
def test_good_captions_stay_as_they_are(name: str, finished: bool | None) -> None:
    assert judge(GOOD[name], PROMPT, finished) == Judgement(GOOD[name], ())


def test_good_captions_end_where_they_are_cut_off_after_a_sentence() -> None:
    # Only that nobody ended the answer is held against these: their last sentence is whole, and ends with a word.
    whole = [caption for caption in GOOD.values() if re.search(r"\w\w[.!。]$", caption) and "000." not in caption]
    assert len(whole) > 10
    for caption in whole:
        assert judge(caption, PROMPT, finished=False) == Judgement(caption, ("cut_off",))


BAD: dict[str, list[str]] = {
    "empty": [
        "",
        "...",
        " </s></s>\n",
        "- - -",
        "😀😀",
    ],
    "refusal": [
        "I'm sorry, but I can't help with that request, because it asks for people in the picture.",
        "I’m sorry, but I can’t assist with identifying the people who are shown in this photograph.",
        "I apologize, but I do not have the ability to see the image that you are talking about.",
        "My apologies, but I must decline to describe this image of a person in any more detail than this.",
        "I cannot see the image, so there is nothing that I could tell you about what it may show.",
        "I don't see any image attached to your message, so please send it once more and I will look.",
        "As an AI language model, I can only read text and have no way to look at pictures like this one.",
        "As an artificial intelligence, I do not look at pictures the way that people do when they see.",
        "Hello! I'm an AI assistant and have no eyes to look at the picture that you are asking about.",
        "Unfortunately, I am not able to process this image at the moment for reasons that are not known.",
        "Unable to view the image at this time, so there is no description that could be given of it.",
        "It seems that there is no image attached. Could you please upload the image again so that I can help?",
        "It looks like you haven't uploaded a picture yet, so there is nothing here to talk about.",
        "Please provide the image that you would like me to describe, and I will do my best to help you.",
        "I'm sorry, but I can't identify people. However, the image shows a man in a suit on a stage.",
        "Sorry for any confusion, but there is no image here that I could tell you anything at all about.",
        "I'm afraid I won't be able to describe this image, since it may show something that is private.",
        "Since I am an AI language model, I cannot look at pictures, but I would like to hear about it.",
        "很抱歉，我无法查看图片，因此不能为您描述其中的内容。请您用文字告诉我图片里有什么。",
    ],
    "copied_prompt": [
        "Describe the image in detail.",
        "Describe the image in detail. " + GOOD["plain"],
        "Describe the image in detail: a brown dog runs across a green lawn, and a ball lies in front of it.",
        "Describe the image in detail\nA brown dog runs across a green lawn, and a ball lies in front of it.",
        "Q: Describe this image in detail. A: Describe the image in detail. Q: Describe the image in detail.",
    ],
    "loop": [
        "The street is full of cars. There is a red car, a red car, a red car, a red car, a red car, a red car.",
        f"{SCENE} The sky is blue blue blue blue blue blue blue blue blue blue blue blue",
        f"{SCENE}" + "!" * 40,
        f"{SCENE} " + ". " * 30 + "end",
        f"{SCENE} " + "ha" * 30,
        "On a table lie a fork and a knife and a fork and a knife and a fork and a knife and then a spoon.",
        "1. a red car\n2. a red car\n3. a red car\n4. a red car\n5. a red car\n6. a red car",
        "Red, blue, red, blue, red, blue, red, blue, red, blue flags hang over the square in front of the church.",
        "图片中有一辆红色的车，一辆红色的车，一辆红色的车，一辆红色的车，停在路边，旁边站着三个人。",
    ],
    "repeated_sentence": [
        "A dog runs on the lawn. The sky is blue. A dog runs on the lawn.",
        "A dog runs on the lawn. The sky is blue. A   DOG runs, on the lawn! There is a ball.",
        "1. A man is walking along the street.\n2. A tree.\n3. A man is walking along the street.",
        "The lamp is switched on\na chair stands in the corner\nThe lamp is switched on",
        GOOD["llava paragraph"] + " " + GOOD["plain"] + " " + GOOD["llava paragraph"].split(". ")[2] + ".",
        "一只橘色的猫坐在窗台上。窗外下着雨，街上有车。一只橘色的猫坐在窗台上。",
    ],
    "too_short": [
        "A cat.",
        "1. A cat",
        "一只猫坐在窗台上。",
        "zzzz",
    ],
}


@pytest.mark.parametrize(("reason", "text"), [(reason, text) for reason, texts in BAD.items() for text in texts])
def test_what_is_wrong_is_found(reason: str, text: str) -> None:
    kept, reasons = judge(text, PROMPT, finished=True)
    assert reason in reasons
    companions = {"copied_prompt": {"too_short", "repeated_sentence"}, "loop": {"too_short"}}  # nothing else may come
    assert set(reasons) <= companions.get(reason, set()) | {reason} | (
        {"repeated_sentence"} if "1. a red car" in text else set()
    )
    assert kept == ("" if reason == "empty" else text.strip())


@pytest.mark.parametrize(
    "text",
    [
        "Sorry, we're closed is written on a sign.",
        "A sign reads: I'm sorry, but I can't open before nine.",
        "I cannot see the face of the man, but he seems to wear a hat.",
        "I don't see any people in this picture.",
        "I won't create waste is printed on the bag.",
        "There is no image on the television screen.",
        "It appears that no picture hangs on the wall.",
        "Please share the road, says the picture on the board.",
        "As an assistant coach looks on, I see the players run.",
        "Unable to see over the wall, a boy in the picture stands on a box.",
        "Hello Kitty is in the picture: a pink bag.",
    ],
)
def test_what_reads_like_a_refusal_but_describes(text: str) -> None:
    assert judge(f"{text} {SCENE}", PROMPT, finished=True) == Judgement(f"{text} {SCENE}", ())
    # Not at the start.
    text = f"{SCENE} A cloud drifts by. I'm sorry, but I can't see the image."
    assert "refusal" not in judge(text, PROMPT, finished=True).reasons


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (f"{SCENE} The leaves are yel", SCENE),
        (f"{SCENE} A sign names Dr. Miller and Mr", SCENE),
        (f"{SCENE} A sign names Dr.", SCENE),
        (f"{SCENE} The dog is about 3.5 feet away and 2.2", SCENE),
        (f'{SCENE} A sign says "Stop!" and the', SCENE),
        (f"{SCENE} She lives at No. 12 in a house that", SCENE),
        (f'{SCENE} A sign says "Stop." The', f'{SCENE} A sign says "Stop."'),
        (f"{SCENE} It rains... The dog", f"{SCENE} It rains..."),
        (f"{SCENE} What is it? Nobody", f"{SCENE} What is it?"),
        (f"{SCENE}\n\n1. The dog is brown.\n2.", f"{SCENE}\n\n1. The dog is brown."),
        (f"{SCENE}\n\n1. The dog is brown.\n2. The coat", f"{SCENE}\n\n1. The dog is brown."),
        (f"{SCENE} It shows: 1. A dog. 2. A coat. 3. A", f"{SCENE} It shows: 1. A dog. 2. A coat."),
        ("一只橘色的猫坐在窗台上，看着窗外的大雨和行人。街上有", "一只橘色的猫坐在窗台上，看着窗外的大雨和行人。"),
        (
            "他对面的女人正在微笑着说：「今天的天气真的非常非常好。」他们",
            "他对面的女人正在微笑着说：「今天的天气真的非常非常好。」",
        ),
        (f"  {SCENE} The leaves are yel\n", SCENE),
    ],
)
@pytest.mark.parametrize("finished", [None, False])
def test_cut_off_captions_end_with_their_last_whole_sentence(text: str, kept: str, finished: bool | None) -> None:
    assert judge(text, PROMPT, finished) == Judgement(kept, ("cut_off",))
    assert judge(text, PROMPT, finished=True) == Judgement(text.strip(), ())


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        # Lines are whole without end marks, if others follow them.
        (
            "On the table in front of the old man stand\n- a cup of tea\n- a plate with a pie\n- a gla",
            "On the table in front of the old man stand\n- a cup of tea\n- a plate with a pie",
        ),
        # What only announces the items that were lost goes with them.
        (f"{SCENE}\n\nObjects in the picture:\n1. A do", SCENE),
        (f"{SCENE}\n## Objects\nA do", SCENE),
        # Lines that were only wrapped.
        (f"{SCENE} The dog is brown and\nlooks at the\ncame", SCENE),
        # Perhaps 3.5.
        (f"{SCENE} The dog is aged 3.", SCENE),
        # A whole last sentence.
        (f"{SCENE} The dog is brown.", f"{SCENE} The dog is brown."),
        # Not one whole sentence.
        (
            "a woman in a red coat walks her dog along a quiet str",
            "a woman in a red coat walks her dog along a quiet str",
        ),
        (
            "The picture shows the following things:\n1. A woman in a red coat and a d",
            "The picture shows the following things:\n1. A woman in a red coat and a d",
        ),
        ("A woman walks her dog, and a man says: Hello, Dr.", "A woman walks her dog, and a man says: Hello, Dr."),
    ],
)
def test_answers_that_reached_the_limit_of_tokens(text: str, kept: str) -> None:
    assert judge(text, PROMPT, finished=False) == Judgement(kept, ("cut_off",))


@pytest.mark.parametrize(
    "text",
    [
        SCENE,
        SCENE.removesuffix("."),
        f"{SCENE} She smiles…",
        f'{SCENE} The sign says "Mind the gap."',
        f"{SCENE} **It is a sunny day.**",
        f"{SCENE}\n- a red coat\n- a brown dog\n- a quiet street",
        'She says "Stop!" and walks on along the quiet street with her dog',
    ],
)
def test_whole_answers_are_not_cut_off_if_nobody_said(text: str) -> None:
    assert judge(text) == Judgement(text, ())


def test_a_caption_may_become_too_short_by_trimming() -> None:
    assert judge("A dog. A woman in a red coat walks along a quiet", finished=False) == Judgement(
        "A dog.", ("cut_off", "too_short")
    )


def test_a_loop_that_reached_the_limit_of_tokens() -> None:
    text = f"{SCENE} There is " + "a red car, " * 40 + "a red"
    assert judge(text, finished=False) == Judgement(SCENE, ("loop", "cut_off"))


@pytest.mark.parametrize("mark", ["</s>", "<|im_end|>", "<|endoftext|>\n</s> "])
def test_end_marks_are_dropped(mark: str) -> None:
    assert judge(f" {SCENE}{mark}", finished=True) == Judgement(SCENE, ())
    assert judge(f"{SCENE} {mark}\n{mark}{mark}") == Judgement(SCENE, ())
    inside = f"{SCENE}{mark.strip()} It rains."
    assert judge(inside, finished=True) == Judgement(inside, ())  # only at the end


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("", GOOD["plain"]),
        ("...", GOOD["plain"]),
        # A prompt that the caption goes on from.
        ("a photo of", "a photo of a brown dog that runs across a green lawn towards a ball"),
        ("This picture shows a", "This picture shows a brown dog that runs across a green lawn towards a ball."),
        # Long prompts share words with any caption.
        (
            "Describe the objects in the foreground, the people in the background, and the colour of the sky. "
            "Mention what is on the left side of the image.",
            "In the foreground stands a table. On the left side of the image a man waits for somebody, and the colour "
            "of the sky tells that it is evening. There are more people in the background, who sit on a bench.",
        ),
        ("请详细描述这张图片。", GOOD["chinese"]),
    ],
)
def test_captions_that_are_not_copied(prompt: str, text: str) -> None:
    assert judge(text, prompt, finished=True) == Judgement(text, ())


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a photo of", "a photo of"),
        ("You are a helpful captioner. Describe the image in detail.", f"Describe the image in detail. {SCENE}"),
        ("Describe this picture", f"Describe this picture. {SCENE}"),
        ("Was siehst du auf dem Bild?", f"Was siehst du auf dem Bild {SCENE}"),
        ("请详细描述这张图片。", "请详细描述这张图片。一只橘色的猫坐在窗台上，看着窗外的大雨和行人。"),
        ("1. Name the objects. 2. Name the colours.", "Name the objects. Name the colours. Name the objects."),
    ],
)
def test_captions_that_are_copied(prompt: str, text: str) -> None:
    assert "copied_prompt" in judge(text, prompt, finished=True).reasons
    assert "copied_prompt" not in judge(text, "", finished=True).reasons


@pytest.mark.parametrize(
    ("text", "reason", "strict", "lenient"),
    [
        (SCENE, "too_short", {"min_words": 14}, {"min_words": 13}),
        ("A cat.", "too_short", {"min_words": 3}, {"min_words": 0}),
        ("一只橘色的猫坐在窗台上。", "too_short", {"min_words": 6}, {"min_words": 5}),
        ("बिल्ली यहाँ बैठी है।", "too_short", {"min_words": 5}, {"min_words": 4}),
        (SCENE, "too_long", {"max_characters": len(SCENE) - 1}, {"max_characters": len(SCENE)}),
        ("no " * 5, "loop", {"loop_words": 5}, {"loop_words": 6}),
        (f"{SCENE} Zzzzz!", "loop", {"loop_words": 4}, {"loop_words": 5}),
        ("the big red car " * 3, "loop", {"loop_repeats": 3}, {"loop_repeats": 4}),
        ("A red car. Rain. A red car.", "repeated_sentence", {"repeat_words": 3}, {"repeat_words": 4}),
        ("Hm: describe the image, it says.", "copied_prompt", {"prompt_share": 0.5}, {"prompt_share": 0.51}),
    ],
)
def test_rules(text: str, reason: str, strict: dict[str, Any], lenient: dict[str, Any]) -> None:
    assert reason in judge(text, PROMPT, True, QualityRules(**strict)).reasons
    assert reason not in judge(text, PROMPT, True, QualityRules(**lenient)).reasons


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("min_words", (-1, 2.5)),
        ("loop_repeats", (1,)),
        ("prompt_share", (0, 1.5)),
    ],
)
def test_wrong_rules_are_refused(option: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"`{option}`"):
            QualityRules(**{option: value})


@pytest.mark.slow
def test_any_text_is_judged() -> None:
    words = ["a red car", "The sky is blue. ", *"Dr J U.S p.m 3 3.5 1. 2)".split(), "I'm sorry, but I can't"]
    marks = list('.!?。」"”):#-_<') + [". ", "...", "</s>", "<|im_end|>", "<|"]
    spaces = [" ", "  ", "\n", "\xa0", "\x1c", "\u2028"]
    letters = ["猫", "坐在窗台上", "zzzzzzzz", "ß", "İ", "हिन्दी", "😀", "\ud800", "\0"]
    pieces = [*words, *marks, *spaces, *letters, PROMPT]
    generator = Random(0)
    seen = Counter()
    for _ in range(5_000):
        text = "".join(generator.choices(pieces, k=generator.randint(0, 20)))
        prompt, finished = generator.choice(["", PROMPT, text[:20]]), generator.choice([None, False, True])
        kept, reasons = judge(text, prompt, finished)
        assert list(reasons) == [reason for reason in REASONS if reason in reasons]
        assert ("empty" not in reasons) or (kept, reasons) == ("", ("empty",))
        cleaned, judged = judge(text, prompt, finished=True)
        assert cleaned.startswith(kept)
        assert cleaned in text
        assert bool(kept) == bool(cleaned)
        assert ("cut_off" in reasons) or kept == cleaned
        assert "cut_off" not in judged
        assert (finished is not False) or reasons == ("empty",) or ("cut_off" in reasons)
        assert judge(kept, prompt, finished=True).text == kept
        # What was trimmed once is whole.
        if finished is None:
            assert judge(kept, prompt).text == kept
        seen.update(reasons)
        seen["trimmed"] += kept != cleaned
    assert set(seen) == {*REASONS, "trimmed"} - {"too_long"}
    assert min(seen.values()) > 30, seen


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "J. " * 20_000,
        "a.b. x " * 10_000,
        "word " * 20_000,
        " ".join(str(Random(0).random()) for _ in range(1_000)) + " " * 20_000 + "a",
        "a" * 100_000,
        "</s>" * 20_000 + "a" + "</s>" * 20_000,
        "1. " * 20_000,
        " ".join(f"w{number}" for number in range(20_000)),
    ],
    ids=["initials", "dotted", "word", "spaces", "letters", "marks", "numbers", "different"],
)
def test_long_answers_are_judged(text: str) -> None:
    for finished in (None, False, True):
        assert judge(text, PROMPT, finished, QualityRules(max_characters=1_000_000)).text

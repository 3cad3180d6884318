"""The whole method in a few minutes on two cores: relabel pictures with long captions, train on them, measure.

Draws pictures that come with short captions alone, as images from the web do. A small LLaVA learns on the spot to
describe such pictures, from fewer ones that have long descriptions. `relabel` has it describe every picture of the
first kind, in shards that the training reads as they are. LoTLIP is trained on these and, for comparison, as long on
the short captions alone. Then long captions look for held-out pictures, and these for long captions.

    python examples/relabel_then_train.py --output relabelled

With your own images and captioners that have seen the world it is two commands, here with the paper's data and models:

    lotlip relabel --data "cc3m/*.tar" --captioner Salesforce/instructblip-vicuna-7b \\
        --captioner llava-hf/llava-1.5-7b-hf --output relabelled
    lotlip train --data relabelled --text-model google-bert/bert-base-uncased \\
        --image-model google/vit-base-patch16-224-in21k --output run
"""

import argparse
import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.trainers import WordLevelTrainer
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.utils import logging

from lotlip_hf.data.records import load_records
from lotlip_hf.data.sentences import split_sentences
from lotlip_hf.images import official_image_processor
from lotlip_hf.relabel.captioners.base import CaptionerConfig
from lotlip_hf.relabel.config import RelabelConfig
from lotlip_hf.relabel.run import relabel
from lotlip_hf.scenes.dataset import (
    GRID,
    NUMBERS,
    PLACES,
    WORDS,
    Scene,
    SceneObject,
    long_captions,
    render,
    scene,
    short_caption,
)
from lotlip_hf.terminal import printable_output, progress_bar
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.data import load_data
from lotlip_hf.training.log import read_log
from lotlip_hf.training.loop import train
from lotlip_hf.training.model import load_or_start_model

NUM_HELD_OUT = 500
IMAGE_SIZE = 64
PATCH_SIZE = IMAGE_SIZE // GRID  # a patch is a cell of the pictures' grid
WIDTH = 128
PAD, BEGIN, END, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
PROMPT = BEGIN + IMAGE * GRID**2
CHAT_TEMPLATE = BEGIN + "{% for message in messages %}{% for part in message['content'] %}" + IMAGE
CHAT_TEMPLATE += "{% endfor %}{% endfor %}"
LEARNING_RATE = 1e-3
IGNORED = -100  # labels that the loss leaves out
# Descriptions that the share of true sentences is taken over, and draws that find all that can be said of a picture
NUM_CHECKED, NUM_DRAWS = 100, 200
TOP_P = 0.9


def save_pictures(scenes: Sequence[Scene], folder: Path) -> None:
    """An image folder with short captions: what there is at first."""
    folder.mkdir(parents=True)
    rows = []
    for one in scenes:
        render(one, IMAGE_SIZE).save(folder / f"{one.id}.png")
        rows.append({"file_name": f"{one.id}.png", "id": one.id, "short_caption": short_caption(one)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def name(item: SceneObject) -> str:
    """Colour and shape, in the plural where there are several."""
    return f"{item.colour} {item.shape}" + ("" if item.count == 1 else "es" if item.shape == "cross" else "s")


def description(one: Scene, number: int) -> str:
    """
    A long description of a scene: its objects row by row, then the background, in words drawn at random. In a fixed
    order the picture decides what comes next, which is learned sooner than sentences in any order.
    """
    random = Random(f"{one.id} description {number}")
    sentences = []
    for item in sorted(one.objects, key=lambda item: (item.cell, item.inside)):
        place = f"inside the {name(one.objects[0])}" if item.inside else random.choice(PLACES[item.cell])
        verb = "is a" if item.count == 1 else f"are {NUMBERS[item.count]}"
        words = [random.choice(WORDS[item.size]), random.choice(WORDS[item.pattern]), name(item)]
        sentences.append(f"{place} there {verb} {' '.join(word for word in words if word)}.")
    sentences = [sentence[0].upper() + sentence[1:] for sentence in sentences]
    return " ".join([*sentences, *(s + "." for s in split_sentences(long_captions(one)[0]) if "background" in s)])


def words_of_cells(one: Scene) -> list[str]:
    """All words that fit what is in each cell of the grid, row by row."""
    cells = [[*places, one.background] for places in PLACES]
    for item in one.objects:
        number = NUMBERS[item.count] if item.count > 1 else ""
        inside = "inside" if item.inside else ""
        cells[item.cell] += [*WORDS[item.size], *WORDS[item.pattern], name(item), number, inside]
    return [f" {' '.join(words)}" for words in cells]


def new_captioner(texts: Sequence[str]) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA of a million random weights, with a token for each word of the texts."""
    words = Tokenizer(WordLevel(unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w\s]"), behavior="isolated")  # a space is the word's
    words.decoder = decoders.Fuse()
    words.train_from_iterator(
        texts, WordLevelTrainer(special_tokens=[PAD, BEGIN, END, UNKNOWN, IMAGE], show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens={"image_token": IMAGE},
        clean_up_tokenization_spaces=False,
    )
    size = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    size["initializer_range"] = WIDTH**-0.5  # at which a layer hands on what it reads
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, **size),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
            **{**size, "num_hidden_layers": 3},
        ),
        tie_word_embeddings=True,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=GRID * GRID,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():  # a tower that sees colours and places from the first step, as `small_model` has it
        (embeddings,) = (module for module in model.modules() if isinstance(module, CLIPVisionEmbeddings))
        embeddings.position_embedding.weight.normal_(std=0.5)
        filters = embeddings.patch_embedding.weight  # [WIDTH, 3, PATCH_SIZE, PATCH_SIZE]
        filters.normal_().add_(2 / PATCH_SIZE * torch.randn(len(filters), 3, 1, 1))
        filters.sub_(filters.mean(1, keepdim=True)).div_(filters[0].numel() ** 0.5)
    processor = LlavaProcessor(
        official_image_processor(IMAGE_SIZE),
        tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" leaves out
        chat_template=CHAT_TEMPLATE,
    )
    return model, processor


def optimize(
    parameters: Iterable[torch.nn.Parameter],
    loss_of_step: Callable[[], torch.Tensor],
    learning_rate: float,
    num_steps: int,
    name: str,
) -> float:
    """AdamW on a loss that is drawn anew in each step; the mean of the last 50 losses."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.02)
    warmup = min(50, num_steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (1 + math.cos(math.pi * step / num_steps)) / 2)
    )
    losses = []
    with progress_bar(range(num_steps), desc=name, unit="step") as steps:
        for _ in steps:
            loss = loss_of_step()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            steps.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
    return sum(losses[-50:]) / len(losses[-50:])


def train_captioner(scenes: Sequence[Scene], folder: Path, num_steps: int) -> float:
    """
    Trains a captioner on descriptions of the scenes and saves it; the mean loss of its last steps.

    As LLaVA is, it is trained in two stages: first its image features become what the words that fit them are to the
    language model, then it learns to describe.
    """
    descriptions = [[description(one, number) for number in range(3)] for one in scenes]
    model, processor = new_captioner([text for one in scenes for text in (*long_captions(one), description(one, 0))])
    tokenizer = processor.tokenizer
    pictures = processor.image_processor([render(one, IMAGE_SIZE) for one in scenes], return_tensors="pt").pixel_values
    random = Random(0)
    model.train()

    cells = torch.zeros(len(scenes), GRID**2, len(tokenizer))  # 1 where the word fits the cell
    for index, one in enumerate(scenes):
        for cell, tokens in enumerate(tokenizer(words_of_cells(one)).input_ids):
            cells[index, cell, tokens] = 1
    embeddings: torch.Tensor = model.get_input_embeddings().weight  # pyright: ignore[reportAssignmentType]

    def alignment_loss() -> torch.Tensor:
        chosen = random.choices(range(len(scenes)), k=64)
        features = model.get_image_features(
            pictures[chosen], vision_feature_layer=-1, vision_feature_select_strategy="default", return_dict=True
        )
        logits = torch.stack(list(features.pooler_output)) @ embeddings.T - 3  # of most words only few fit
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, cells[chosen], reduction="sum")
        return loss / cells[chosen, :, 0].numel()

    optimize(model.parameters(), alignment_loss, 2e-3, max(1, num_steps // 3), "captioner, words of images")

    tokens = [tokenizer([PROMPT + text + END for text in texts]).input_ids for texts in descriptions]
    given = torch.tensor([tokenizer.pad_token_id, tokenizer.bos_token_id, model.config.image_token_index])

    def description_loss() -> torch.Tensor:
        chosen = random.choices(range(len(scenes)), k=16)
        batch = tokenizer.pad({"input_ids": [random.choice(tokens[index]) for index in chosen]}, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(torch.isin(batch["input_ids"], given), IGNORED)
        return model(pixel_values=pictures[chosen], labels=labels, **batch).loss

    loss = optimize(model.parameters(), description_loss, LEARNING_RATE, num_steps, "captioner, descriptions")
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return loss


def true_share(scenes: Sequence[Scene], captions: Sequence[str]) -> float:
    """The share of the captions' sentences that Scenes would say of their pictures too."""
    is_true = []
    for one, caption in zip(scenes, captions, strict=True):
        namesakes = (replace(one, id=f"{one.id} {number}") for number in range(NUM_DRAWS))  # the id decides the words
        truths = {
            sentence for other in namesakes for text in long_captions(other) for sentence in split_sentences(text)
        }
        is_true += [sentence in truths for sentence in split_sentences(caption)]
    return sum(is_true) / max(len(is_true), 1)


def train_lotlip(data: Path, pictures: Path, output: Path, num_steps: int, num_long_texts: int) -> dict[str, float]:
    """Trains a small LoTLIP, as `lotlip train` does, without a word about columns; R@1 over held-out scenes."""
    config = TrainingConfig(
        output=str(output),
        model="scenes",
        data=str(data),
        image_root=str(pictures),  # the shards hold paths
        eval_data="scenes",
        eval_split="test",
        eval_samples=NUM_HELD_OUT,
        max_steps=num_steps,
        batch_size=64,
        learning_rate=1.5e-3,
        warmup_steps=min(100, num_steps),
        num_long_texts=num_long_texts,
        num_sentences=0,  # whole captions: a model this small learns them sooner than their parts
        # a short caption is one of the four features that the loss is the mean of
        term_options=["infonce.short_loss_weight=2"],
        num_workers=1,
    )
    records, eval_records = load_data(config)
    model, processor = load_or_start_model(config)
    train(model, processor, records, config, eval_records)
    last = [line for line in read_log(output) if "long_text_to_image_r1" in line][-1]
    return {name: last[f"long_{name}"] for name in ("image_to_text_r1", "text_to_image_r1")}


def print_table(results: dict[str, dict[str, float]]) -> None:
    """Print R@1 of both trainings."""
    print(f"\nLong captions and {NUM_HELD_OUT} held-out pictures: R@1, by chance {1 / NUM_HELD_OUT:.1%}")
    print("  trained on                      image to text  text to image")
    for name, values in results.items():
        print(f"  {name:30} {values['image_to_text_r1']:14.1%} {values['text_to_image_r1']:14.1%}")


@printable_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Draw, train a captioner, relabel, train LoTLIP with and without the new captions, measure.

    Args:
        argv: Arguments of the command line; by default those of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("relabelled"), help="folder for everything it makes")
    parser.add_argument("--num-scenes", type=int, default=4000, help="pictures that come with short captions")
    parser.add_argument("--num-described", type=int, default=3000, help="pictures that the captioner learns from")
    parser.add_argument("--captioner-steps", type=int, default=1500, help="steps of the captioner's training")
    parser.add_argument("--train-steps", type=int, default=500, help="steps of either training of LoTLIP")
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()  # of loading and saving weights; ours stay
    torch.set_num_threads(1)  # models so small gain little from more, and lose much where cores are busy
    folders = [arguments.output / name for name in ("pictures", "captioner", "data", "run-long", "run-short")]
    pictures, captioner, data, run_long, run_short = folders
    for folder in folders:  # of an earlier time
        shutil.rmtree(folder, ignore_errors=True)

    scenes = [scene(index) for index in range(arguments.num_scenes)]
    save_pictures(scenes, pictures)
    described = [scene(index, seed=1) for index in range(arguments.num_described)]
    train_captioner(described, captioner, arguments.captioner_steps)

    relabel(
        RelabelConfig(
            data=str(pictures),
            output=str(data),
            embed_images=True,
            captioners=[
                CaptionerConfig(
                    model=str(captioner),
                    prompt="",
                    max_new_tokens=140,
                    temperature=1.0,  # for other words each time: the most probable one is always the same
                    top_p=TOP_P,
                    dtype="float32",
                    batch_size=64,
                )
            ],
            tokenizer=str(captioner),
        )
    )
    by_id = {one.id: one for one in scenes}
    records = list(load_records(data))
    captions = {record["id"]: record["long_captions"][0] for record in records}
    checked = list(captions)[:NUM_CHECKED]
    results: dict[str, dict[str, float]] = {
        "captioner": {"true_share": true_share([by_id[id] for id in checked], [captions[id] for id in checked])}
    }
    first = records[0]
    print(
        f"\n{first['id']}.png\n  short caption: {first['short_caption']}\n  new caption:   {first['long_captions'][0]}"
    )
    print(f"Of the new sentences {results['captioner']['true_share']:.0%} are true.\n", flush=True)

    results["short and new long captions"] = train_lotlip(
        data, pictures, run_long, arguments.train_steps, num_long_texts=1
    )
    results["short captions alone"] = train_lotlip(data, pictures, run_short, arguments.train_steps, num_long_texts=0)
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print_table({name: values for name, values in results.items() if name != "captioner"})
    print(f"""
The pictures            {pictures}
The captioner           {captioner} (AutoModelForImageTextToText.from_pretrained)
The new captions        {data}
The model               {run_long}
""")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Run the whole method in a few minutes on two cores: relabel pictures with long captions, train on them, and measure.

    python examples/relabel_then_train.py --output relabelled

The example draws pictures with short captions, as on the web. A small LLaVA is trained on other pictures with long
descriptions. With this LLaVA, `relabel` writes long captions of the first pictures into shards. LoTLIP is trained once
on these shards and, for comparison, once on short captions only. Both runs are evaluated with long captions of
held-out pictures.

With your own images and pretrained captioners, the method takes two commands, here with the data and models of the
paper:

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
    CELL_NAMES,
    GRID,
    NUMBERS,
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
PATCH_SIZE = IMAGE_SIZE // GRID  # each patch is one cell of a picture
WIDTH = 128
PAD, BEGIN, END, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
PROMPT = BEGIN + IMAGE * GRID**2
CHAT_TEMPLATE = BEGIN + "{% for message in messages %}{% for part in message['content'] %}" + IMAGE
CHAT_TEMPLATE += "{% endfor %}{% endfor %}"
LEARNING_RATE = 1e-3
IGNORED = -100  # label of tokens that the loss ignores
NUM_CHECKED = 100  # number of captions to check
NUM_DRAWS = 200  # number of times to draw captions of a scene, to collect its true sentences
TOP_P = 0.9


def save_pictures(scenes: Sequence[Scene], folder: Path) -> None:
    """Writes an image folder with short captions."""
    folder.mkdir(parents=True)
    rows = []
    for one in scenes:
        render(one, IMAGE_SIZE).save(folder / f"{one.id}.png")
        rows.append({"file_name": f"{one.id}.png", "id": one.id, "short_caption": short_caption(one)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def name(item: SceneObject) -> str:
    """Returns the colour and shape of an object, in the plural if there are several."""
    return f"{item.colour} {item.shape}" + ("" if item.count == 1 else "es" if item.shape == "cross" else "s")


def description(one: Scene, number: int) -> str:
    """
    Returns a long description of a scene in random words: its objects row by row, then the background. A fixed order
    of sentences is learned sooner than a random one.
    """
    random = Random(f"{one.id} description {number}")
    sentences = []
    for item in sorted(one.objects, key=lambda item: (item.cell, item.inside)):
        cell = f"inside the {name(one.objects[0])}" if item.inside else random.choice(CELL_NAMES[item.cell])
        verb = "is a" if item.count == 1 else f"are {NUMBERS[item.count]}"
        words = [random.choice(WORDS[item.size]), random.choice(WORDS[item.pattern]), name(item)]
        sentences.append(f"{cell} there {verb} {' '.join(word for word in words if word)}.")
    sentences = [sentence[0].upper() + sentence[1:] for sentence in sentences]
    return " ".join([*sentences, *(s + "." for s in split_sentences(long_captions(one)[0]) if "background" in s)])


def words_of_cells(one: Scene) -> list[str]:
    """Returns all words that describe each cell of a scene, row by row."""
    cells = [[*names, one.background] for names in CELL_NAMES]
    for item in one.objects:
        number = NUMBERS[item.count] if item.count > 1 else ""
        inside = "inside" if item.inside else ""
        cells[item.cell] += [*WORDS[item.size], *WORDS[item.pattern], name(item), number, inside]
    return [f" {' '.join(words)}" for words in cells]


def new_captioner(texts: Sequence[str]) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Creates a LLaVA with a million random weights and one token for each word of the texts."""
    words = Tokenizer(WordLevel(unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w\s]"), behavior="isolated")  # keeps leading spaces
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
    size["initializer_range"] = WIDTH**-0.5  # preserves the scale of hidden states
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
    with torch.no_grad():  # initialises the image tower like `small_model`, to see colours and positions
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
        num_additional_image_tokens=1,  # the class token, which "default" removes
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
    """Minimises a loss with AdamW and returns the mean of the last 50 losses."""
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
    Trains a captioner on descriptions of scenes, saves it, and returns the mean loss of its last steps.

    There are two stages, as for LLaVA. The first aligns image features with the embeddings of the words that describe
    them. The second trains the captioner to describe pictures.
    """
    descriptions = [[description(one, number) for number in range(3)] for one in scenes]
    model, processor = new_captioner([text for one in scenes for text in (*long_captions(one), description(one, 0))])
    tokenizer = processor.tokenizer
    pictures = processor.image_processor([render(one, IMAGE_SIZE) for one in scenes], return_tensors="pt").pixel_values
    random = Random(0)
    model.train()

    cells = torch.zeros(len(scenes), GRID**2, len(tokenizer))  # 1 if the word describes the cell
    for index, one in enumerate(scenes):
        for cell, tokens in enumerate(tokenizer(words_of_cells(one)).input_ids):
            cells[index, cell, tokens] = 1
    embeddings: torch.Tensor = model.get_input_embeddings().weight  # pyright: ignore[reportAssignmentType]

    def alignment_loss() -> torch.Tensor:
        chosen = random.choices(range(len(scenes)), k=64)
        features = model.get_image_features(
            pictures[chosen], vision_feature_layer=-1, vision_feature_select_strategy="default", return_dict=True
        )
        logits = torch.stack(list(features.pooler_output)) @ embeddings.T - 3  # bias: few words fit a cell
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
    """Returns the fraction of sentences that also occur in captions of Scenes for the same picture."""
    is_true = []
    for one, caption in zip(scenes, captions, strict=True):
        copies = (replace(one, id=f"{one.id} {number}") for number in range(NUM_DRAWS))  # the id seeds the words
        truths = {sentence for other in copies for text in long_captions(other) for sentence in split_sentences(text)}
        is_true += [sentence in truths for sentence in split_sentences(caption)]
    return sum(is_true) / max(len(is_true), 1)


def train_lotlip(data: Path, pictures: Path, output: Path, num_steps: int, num_long_texts: int) -> dict[str, float]:
    """Trains a small LoTLIP like `lotlip train`, and returns R@1 over held-out scenes."""
    config = TrainingConfig(
        output=str(output),
        model="scenes",
        data=str(data),
        image_root=str(pictures),  # allows the image paths in the shards
        eval_data="scenes",
        eval_split="test",
        eval_samples=NUM_HELD_OUT,
        max_steps=num_steps,
        batch_size=64,
        learning_rate=1.5e-3,
        warmup_steps=min(100, num_steps),
        num_long_texts=num_long_texts,
        num_sentences=0,  # a model of this size learns whole captions sooner than sub-captions
        # By default, the short text is only one of four features in the loss.
        term_options=["infonce.short_loss_weight=2"],
        num_workers=1,
    )
    records, eval_records = load_data(config)
    model, processor = load_or_start_model(config)
    train(model, processor, records, config, eval_records)
    last = [line for line in read_log(output) if "long_text_to_image_r1" in line][-1]
    return {name: last[f"long_{name}"] for name in ("image_to_text_r1", "text_to_image_r1")}


def print_table(results: dict[str, dict[str, float]]) -> None:
    """Prints R@1 of both runs."""
    print(f"\nLong captions and {NUM_HELD_OUT} held-out pictures: R@1, by chance {1 / NUM_HELD_OUT:.1%}")
    print("  trained on                      image to text  text to image")
    for name, values in results.items():
        print(f"  {name:30} {values['image_to_text_r1']:14.1%} {values['text_to_image_r1']:14.1%}")


@printable_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Relabels, trains LoTLIP with and without the new captions, measures, and returns the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("relabelled"), help="folder for all results")
    parser.add_argument("--num-scenes", type=int, default=4000, help="number of pictures with short captions")
    parser.add_argument(
        "--num-described", type=int, default=3000, help="number of pictures for training the captioner"
    )
    parser.add_argument("--captioner-steps", type=int, default=1500, help="training steps of the captioner")
    parser.add_argument("--train-steps", type=int, default=500, help="training steps of each LoTLIP")
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()  # hides the bars of loading and saving weights
    torch.set_num_threads(1)  # small models gain little from more threads and lose time on busy cores
    folders = [arguments.output / name for name in ("pictures", "captioner", "data", "run-long", "run-short")]
    pictures, captioner, data, run_long, run_short = folders
    for folder in folders:  # from an earlier call
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
                    temperature=1.0,  # varies the words, unlike greedy decoding
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
    print(f"{results['captioner']['true_share']:.0%} of the new sentences are true.\n", flush=True)

    results["short and new long captions"] = train_lotlip(
        data, pictures, run_long, arguments.train_steps, num_long_texts=1
    )
    results["short captions alone"] = train_lotlip(data, pictures, run_short, arguments.train_steps, num_long_texts=0)
    (arguments.output / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print_table({name: values for name, values in results.items() if name != "captioner"})
    print(f"""
Pictures            {pictures}
Captioner           {captioner} (AutoModelForImageTextToText.from_pretrained)
New captions        {data}
Model               {run_long}
""")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

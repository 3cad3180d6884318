"""Tiny random captioning models of transformers' own classes, in folders with processors, shared by the tests."""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AddedToken,
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    GPT2Config,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    ViTImageProcessorPil,
)

import tiny_clip

PAD, BEGIN, END, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
IMAGE = "<image>"
WORDS = tuple(
    "a the photo picture image of in on with and two three red green blue large small old cat dog car house tree "
    "table man woman street sky sits stands runs looks left right is are there describe detail what user assistant "
    "shows near under behind bright dark wooden white . , : ?".split()
)
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
# 16 patches
IMAGE_SIZE = {"image_size": 32, "patch_size": 8}
SQUARE = {"height": IMAGE_SIZE["image_size"], "width": IMAGE_SIZE["image_size"]}
POSITIONS = 512
FOLDERS: list[tempfile.TemporaryDirectory[str]] = []
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)
# Those of language models take a text instead of parts
TEXT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} : {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


def tokenizer(template: str = f"{BEGIN} $A", extra: tuple[str, ...] = (), **kwargs: object) -> PreTrainedTokenizerFast:
    """A token for each of `WORDS`; `template` is what is put around a text, `extra` are more special tokens."""
    special = (PAD, BEGIN, END, UNKNOWN, *extra)
    vocabulary = {word: place for place, word in enumerate((*special, *WORDS))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##")  # words are joined by spaces, without one before a full stop
    used = [token for token in (BEGIN, END) if token in template]
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, vocabulary[token]) for token in used]
    )
    names = {"pad_token": PAD, "bos_token": BEGIN, "eos_token": END, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=POSITIONS,
        extra_special_tokens=[AddedToken(token, special=True, normalized=False) for token in extra],
        **{**names, **kwargs},
    )


def language_model(kind: str, vocabulary: PreTrainedTokenizerFast, positions: int = POSITIONS) -> PreTrainedConfig:
    """Configuration of OPT, T5 or Llama over a vocabulary of `tokenizer`."""
    tokens: Any = token_ids(vocabulary)
    if kind == "opt":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 37}
        return OPTConfig(
            **tokens, **sizes, word_embed_proj_dim=32, max_position_embeddings=positions, tie_word_embeddings=False
        )
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
        return T5Config(**tokens, **sizes, decoder_start_token_id=vocabulary.pad_token_id, tie_word_embeddings=False)
    return LlamaConfig(
        **tokens, **SIZE, num_key_value_heads=4, max_position_embeddings=positions, tie_word_embeddings=False
    )


def qformer(words: PreTrainedTokenizerFast) -> dict[str, int]:
    size = {"encoder_hidden_size": SIZE["hidden_size"], "max_position_embeddings": POSITIONS}
    return {**SIZE, **size, "vocab_size": len(words), "cross_attention_frequency": 1}


def token_ids(words: PreTrainedTokenizerFast) -> dict[str, int | None]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(words), **{name: getattr(words, name) for name in names}}


def _save(
    model: PreTrainedModel, processor: Any, words: PreTrainedTokenizerFast, folder: str | Path, seed: int
) -> PreTrainedModel:
    """Saves a model with random weights: of the special tokens it answers with `</s>` alone, now early, now late."""
    tiny_clip.random_weights(model, seed)
    with torch.no_grad():
        generator = getattr(model, "language_model", None) or getattr(model, "text_decoder", None) or model
        head = generator.get_output_embeddings()
        special = [place for word, place in words.get_vocab().items() if word not in (*WORDS, END)]
        head.weight[special] = 0.0
        head.weight[words.eos_token_id] *= 2
        if head.bias is not None:
            head.bias[special] = -10.0
    model.eval()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model


def save_blip(folder: str | Path, seed: int = 0) -> PreTrainedModel:
    """BLIP: its answers begin with the prompt and end with [SEP], which is `</s>` here."""
    words = tokenizer(f"{BEGIN} $A {END}")
    config = BlipConfig(
        text_config={
            **SIZE,
            **token_ids(words),
            "encoder_hidden_size": SIZE["hidden_size"],
            "projection_dim": 32,
            "max_position_embeddings": POSITIONS,
            "eos_token_id": words.pad_token_id,  # of no use: BLIP ends with the next one
            "sep_token_id": words.eos_token_id,
            "tie_word_embeddings": False,
        },
        vision_config={**SIZE, **IMAGE_SIZE, "projection_dim": 32},
        projection_dim=32,
        image_text_hidden_size=32,
        tie_word_embeddings=False,
    )
    processor = BlipProcessor(BlipImageProcessorPil(size=SQUARE), words)
    return _save(BlipForConditionalGeneration(config), processor, words, folder, seed)


def save_blip2(folder: str | Path, seed: int = 0, kind: str = "opt", positions: int = POSITIONS) -> PreTrainedModel:
    """BLIP-2 over OPT or T5."""
    words = tokenizer(f"{BEGIN} $A" if kind == "opt" else f"$A {END}", extra=(IMAGE,))
    config = Blip2Config(
        vision_config={**SIZE, **IMAGE_SIZE},
        qformer_config=qformer(words),
        text_config=language_model(kind, words, positions).to_dict(),
        num_query_tokens=4,
        image_token_index=words.convert_tokens_to_ids(IMAGE),
        image_text_hidden_size=32,
    )
    processor = Blip2Processor(BlipImageProcessorPil(size=SQUARE), words, num_query_tokens=4)
    return _save(Blip2ForConditionalGeneration(config), processor, words, folder, seed)


def save_instructblip(folder: str | Path, seed: int = 0, kind: str = "llama") -> PreTrainedModel:
    """InstructBLIP over Llama, OPT or T5; its Q-Former reads the prompt too."""
    words = tokenizer(f"$A {END}" if kind == "t5" else f"{BEGIN} $A", extra=(IMAGE,))
    qformer_words = tokenizer(f"{BEGIN} $A {END}")
    config = InstructBlipConfig(
        vision_config={**SIZE, **IMAGE_SIZE},
        qformer_config=qformer(qformer_words),
        text_config=language_model(kind, words).to_dict(),
        num_query_tokens=4,
        image_token_index=words.convert_tokens_to_ids(IMAGE),
    )
    processor = InstructBlipProcessor(BlipImageProcessorPil(size=SQUARE), words, qformer_words, num_query_tokens=4)
    return _save(InstructBlipForConditionalGeneration(config), processor, words, folder, seed)


def save_llava(folder: str | Path, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedModel:
    """LLaVA: CLIP's image tower and Llama, with a chat template, or without one (`None`)."""
    words = tokenizer(extra=(IMAGE,))
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SIZE, **IMAGE_SIZE, projection_dim=32).to_dict(),
        text_config=language_model("llama", words).to_dict(),
        image_token_index=words.convert_tokens_to_ids(IMAGE),
        image_seq_length=16,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE),
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # [CLS], which "default" leaves out
        chat_template=chat_template,
    )
    return _save(LlavaForConditionalGeneration(config), processor, words, folder, seed)


def save_llama(folder: str | Path, seed: int = 0, chat_template: str | None = TEXT_TEMPLATE) -> None:
    """A language model without images, with a chat template, or without one (`None`)."""
    words = tokenizer(chat_template=chat_template)
    _save(LlamaForCausalLM(language_model("llama", words)), words, words, folder, seed)


def save_idefics3(folder: str | Path, seed: int = 0) -> PreTrainedModel:
    """Idefics 3, which SmolVLM is built on: images of other sizes have other numbers of tokens."""
    image_tokens = ("<fake_token_around_image>", IMAGE, "<end_of_utterance>", "<global-img>")
    grid = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    words = tokenizer(extra=(*image_tokens, *grid))
    config = Idefics3Config(
        vision_config={**SIZE, **IMAGE_SIZE},
        text_config=language_model("llama", words).to_dict(),
        image_token_id=words.convert_tokens_to_ids(IMAGE),
        scale_factor=2,
        pad_token_id=words.pad_token_id,
    )
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        words,
        image_seq_len=4,  # of the 16 patches each 2 x 2 become one
        chat_template=CHAT_TEMPLATE,
    )
    return _save(Idefics3ForConditionalGeneration(config), processor, words, folder, seed)


def save_git(folder: str | Path, seed: int = 0) -> PreTrainedModel:
    """GIT: its tokenizer ends a prompt with the token that also ends an answer."""
    words = tokenizer(f"{BEGIN} $A {END}")
    config = GitConfig(
        **SIZE, **token_ids(words), vision_config={**SIZE, **IMAGE_SIZE}, max_position_embeddings=POSITIONS
    )
    processor = GitProcessor(CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE), words)
    return _save(GitForCausalLM(config), processor, words, folder, seed)


def save_vit_gpt2(folder: str | Path, seed: int = 0, positions: int = POSITIONS) -> PreTrainedModel:
    """ViT and GPT-2, which has no padding token and takes no prompt; the checkpoint has no processor of both."""
    words = tokenizer("$A", pad_token=None, bos_token=END)
    decoder = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_inner=37,
        n_positions=positions,
        vocab_size=len(words),
        bos_token_id=words.eos_token_id,
        eos_token_id=words.eos_token_id,
        add_cross_attention=True,
        is_decoder=True,
        tie_word_embeddings=False,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**SIZE, **IMAGE_SIZE), decoder)
    config.decoder_start_token_id = words.bos_token_id
    model = VisionEncoderDecoderModel(config=config)
    ViTImageProcessorPil(size=SQUARE).save_pretrained(folder)
    return _save(model, words, words, folder, seed)


# Those that caption without a prompt alone
NO_PROMPT = ("vit_gpt2",)


@cache
def counting_tokenizer() -> str:
    """The folder of a tokenizer that counts the tokens of captions, that of the golden files."""
    folder = tempfile.TemporaryDirectory()
    FOLDERS.append(folder)  # kept until the process ends
    BertTokenizer.from_pretrained(Path(__file__).parent / "golden" / "tokenizer").save_pretrained(folder.name)
    return folder.name

"""
Captions by local models of transformers: all models of `AutoModelForImageTextToText`, each with its processor, and
for texts without images also those of `AutoModelForCausalLM`.

The prompt is passed through the chat template of the processor, or as text next to the images. The answer is the part
of `generate`'s output after the prompt. The generation settings of the checkpoint are ignored, so that the published
settings are those that were used.
"""

import gc
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from accelerate import PartialState
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from ...files import one_line
from ...loading import cached_commit, checkpoint_name, load_strict, naming_damage, quiet, usable_device
from .base import IMAGE_ERRORS, Answer, CaptionerConfig

# Only these entries of a checkpoint's generation config are used: special and forbidden tokens
TOKENS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
)


class LocalCaptioner:
    """
    A captioner that runs a model of transformers.

    Models without a prompt, such as `VisionEncoderDecoderModel`, need an empty `config.prompt`. The prompt of BLIP is
    the beginning of the caption, which its answers do not repeat.

    Args:
        config (`CaptionerConfig`): Model, prompt and settings.
        device (`str` or `torch.device`, *optional*): Device of the model if `config.device_map` is not set. By default
            the device of this process.

    Attributes:
        revision (`str` or `None`): Commit of the model; `config.revision` if the commit is unknown, `None`
            for a folder.
        group_size (`int`): Number of images in a batch, `config.batch_size`.

    Raises:
        `ValueError`: If the model does not describe images, lacks weights or a processor, does not accept the prompt,
            has too few positions for prompt and answer, or if `device` is not available.
        `OSError`: If the checkpoint does not exist.

    Example:

    ```python
    >>> from lotlip_hf.images import load_image
    >>> from lotlip_hf.relabel.captioners.base import CaptionerConfig
    >>> from lotlip_hf.relabel.captioners.local import LocalCaptioner

    >>> captioner = LocalCaptioner(CaptionerConfig("llava-hf/llava-1.5-7b-hf", batch_size=4))  # doctest: +SKIP
    >>> images, settings = [load_image("photos/cat.png")], captioner.config.settings()  # doctest: +SKIP
    >>> [answer] = captioner.answer(images, settings, seeds=[0])  # doctest: +SKIP
    >>> answer.text, answer.finished  # doctest: +SKIP
    ```
    """

    concurrency = 1

    def __init__(self, config: CaptionerConfig, device: str | torch.device | None = None) -> None:
        self.config = config
        self.group_size = config.batch_size
        self.model, self.revision = _load_model(config, device)
        self._processor, self._tokenizer = _load_processor(config, self.revision)
        self._generator = _generator(self.model)
        self._end_tokens = self._set_tokens()
        self._check_prompt()

    def answer(
        self,
        images: Sequence[Image.Image | None],
        settings: Mapping[str, Any],
        seeds: Sequence[int],
        prompts: Sequence[str] | None = None,
    ) -> list[Answer]:
        """
        Answers one batch; see [`Captioner`]. Drawn tokens of an image depend on the seeds of all images.

        Raises:
            `ArithmeticError`, `LookupError`, `TypeError`, `ValueError`: If the processor does not accept an image, a
                prompt is too long, or the model does not generate token by token.
            `torch.OutOfMemoryError`: If the images do not fit in memory.
        """
        inputs = self._inputs(images, prompts or [self.config.prompt] * len(images))
        if prompts is not None:
            self._check_length(inputs, int(settings["max_new_tokens"]))
        return self._generate(inputs, settings, seeds)

    def close(self) -> None:
        """Frees the memory of the model."""
        self.model = self._generator = None
        gc.collect()
        if torch.accelerator.is_available():
            torch.get_device_module().empty_cache()

    def _inputs(self, images: Sequence[Image.Image | None], prompts: Sequence[str]) -> BatchFeature:
        """Returns the inputs of the model's `generate`, on its device."""
        if getattr(self._processor, "chat_template", None):
            is_text_model = self._processor is self._tokenizer
            contents = prompts if is_text_model else map(_parts, images, prompts)
            inputs = self._processor.apply_chat_template(
                [[{"role": "user", "content": content}] for content in contents],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                **({"padding": True} if is_text_model else {"processor_kwargs": {"padding": True}}),
            )
        elif self.config.input == "text":
            inputs = self._without_end(self._tokenizer(list(prompts), padding=True, return_tensors="pt"))
        elif any(prompts) or hasattr(self._processor, "qformer_tokenizer"):  # InstructBLIP needs a text, even ""
            inputs = self._processor(images=list(images), text=list(prompts), padding=True, return_tensors="pt")
            inputs = self._without_end(inputs)
        else:
            inputs = self._processor(images=list(images), return_tensors="pt")
        return BatchFeature(dict(inputs)).to(device=self.model.device, dtype=self.model.dtype)

    def _without_end(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Removes the end token that GIT's tokenizer adds after the prompt, so that the answer can follow."""
        input_ids = inputs.get("input_ids")
        # Encoders need the end token, and models with a language model inside (BLIP) remove it themselves.
        if input_ids is None or self._generator is not self.model or self._generator.config.is_encoder_decoder:
            return dict(inputs)
        if not all(last in self._end_tokens for last in input_ids[:, -1].tolist()):
            return dict(inputs)
        return {
            key: value[:, :-1] if getattr(value, "shape", None) == input_ids.shape else value
            for key, value in inputs.items()
        }

    def _generate(self, inputs: BatchFeature, settings: Mapping[str, Any], seeds: Sequence[int]) -> list[Answer]:
        options: dict[str, Any] = {
            "max_new_tokens": int(settings["max_new_tokens"]),
            "min_new_tokens": int(settings["min_new_tokens"]),
            "num_beams": int(settings["num_beams"]),
            "repetition_penalty": float(settings["repetition_penalty"]),
            "do_sample": settings["temperature"] > 0,
        }
        if options["do_sample"]:
            # 0 disables `top_k`; the default of transformers is 50.
            options |= {"temperature": float(settings["temperature"]), "top_p": float(settings["top_p"]), "top_k": 0}
        prompt = _PromptLength()
        try:
            # `quiet` hides warnings that do not apply here, for example about padding without a prompt.
            with torch.inference_mode(), _seeded(seeds), quiet():
                tokens = self.model.generate(**inputs, **options, logits_processor=LogitsProcessorList([prompt]))
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"{self.config.model}: out of memory for a batch of {self.group_size} images ({error}). Set a smaller "
                "`batch_size`."
            ) from error
        if prompt.length is None:
            raise ValueError(
                f"{self.config.model}: {type(self.model).__name__} has its own `generate`, which does not show "
                "where the answer begins. Run the model behind an endpoint (`endpoint`)."
            )
        return [self._read(row) for row in tokens[:, prompt.length :].tolist()]

    def _read(self, tokens: list[int]) -> Answer:
        """Decodes new tokens up to the end token."""
        end = next((index for index, token in enumerate(tokens) if token in self._end_tokens), None)
        text = self._tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
        return Answer(text, finished=end is not None)

    def _set_tokens(self) -> set[int]:
        """Removes everything except `TOKENS` from the model's generation config; returns the end tokens."""
        recommended = self._generator.generation_config
        tokens = {name: getattr(recommended, name, None) for name in TOKENS}
        if self.model.config.model_type == "blip":  # BLIP's `generate` ends with [SEP]
            tokens["eos_token_id"] = self.model.config.text_config.sep_token_id
        if tokens["eos_token_id"] is None:
            tokens["eos_token_id"] = self._tokenizer.eos_token_id
        ends = tokens["eos_token_id"]
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        if self._tokenizer.pad_token_id is None and ends:
            self._tokenizer.pad_token = self._tokenizer.convert_ids_to_tokens(ends[0])
        if tokens["pad_token_id"] is None:
            tokens["pad_token_id"] = self._tokenizer.pad_token_id
        self._generator.generation_config = type(recommended)(**tokens)
        if not self._generator.config.is_encoder_decoder:
            self._tokenizer.padding_side = "left"  # the answer must follow the last token of the prompt directly
        return set(ends)

    def _check_prompt(self) -> None:
        """Checks with a blank image that the model accepts the prompt and has enough positions for the answer."""
        name, prompt, reads_text = self.config.model, self.config.test_prompt, self.config.input == "text"
        try:
            inputs = self._inputs([None if reads_text else Image.new("RGB", (224, 224))], [prompt])
        except IMAGE_ERRORS as error:
            raise ValueError(
                f"{name}: {type(self._processor).__name__} does not accept an image with the prompt {prompt!r} "
                f"({error}). Write `prompt` in the format of the model, with its image token if it has no chat "
                "template, or set an empty `prompt`."
            ) from error
        if prompt and not {"input_ids", "decoder_input_ids"} & inputs.keys():
            raise ValueError(f"{name}: {type(self.model).__name__} has no prompt. Set an empty `prompt`.")
        image_token = None if reads_text else getattr(self.model.config, "image_token_id", None)
        if "input_ids" in inputs and image_token is not None and not (inputs["input_ids"] == image_token).any():
            raise ValueError(
                f"{name}: {type(self._processor).__name__} does not add an image token, and the prompt {prompt!r} has "
                f"none. Add {self._tokenizer.convert_ids_to_tokens(image_token)!r} to `prompt`."
            )
        self._check_length(inputs, max(int(self.config.settings(attempt)["max_new_tokens"]) for attempt in (0, 1)))

    def _check_length(self, inputs: Mapping[str, Any], new: int) -> None:
        """Checks that the model has enough positions for prompt and answer."""
        read = "decoder_input_ids" if self._generator.config.is_encoder_decoder else "input_ids"
        length = inputs[read].shape[1] if read in inputs else 1
        positions = getattr(self._generator.config.get_text_config(decoder=True), "max_position_embeddings", None)
        # The last new token needs no position.
        if positions and length + new - 1 > positions:
            raise ValueError(
                f"{self.config.model} has {positions} positions, and image and prompt need {length}. Set at most "
                f"{max(0, positions - length + 1)} for `max_new_tokens`, got {new}."
            )


def check_model(config: CaptionerConfig) -> None:
    """
    Checks before long work that a model and its processor exist, without loading the weights.

    Args:
        config (`CaptionerConfig`): Options of the captioner.

    Raises:
        `ValueError`: If the model does not describe images or has no processor.
        `OSError`: If the checkpoint does not exist.
    """
    _load_processor(config, _load_config(config)[-1])


def _parts(image: Image.Image | None, prompt: str) -> list[dict[str, Any]]:
    """Returns the content of a message for processors: the image, if there is one, and the prompt."""
    parts: list[dict[str, Any]] = [] if image is None else [{"type": "image", "image": image}]
    return [*parts, {"type": "text", "text": prompt}] if prompt else parts


class _PromptLength(LogitsProcessor):
    """Records the number of tokens before the first new token; the output of some models includes the prompt."""

    length: int | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.length is None:  # before the first new token
            self.length = input_ids.shape[1]
        return scores


@contextmanager
def _seeded(seeds: Sequence[int]) -> Iterator[None]:
    """Seeds the random numbers, and restores the caller's state afterwards."""
    digest = hashlib.sha256(repr([int(seed) for seed in seeds]).encode()).digest()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = range(torch.accelerator.device_count()) if accelerator is not None else ()
    with torch.random.fork_rng(devices, device_type="cuda" if accelerator is None else accelerator.type):
        torch.manual_seed(int.from_bytes(digest[:4], "big"))
        yield


def _load_config(config: CaptionerConfig) -> tuple[PreTrainedConfig, Any, str | None]:
    """Returns the config and class of the model, and their revision."""
    name, revision = checkpoint_name(config.model, config.revision), config.revision
    with naming_damage(name, revision):
        model_config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    # Pins the commit, so that weights and processor match if a new commit is pushed meanwhile.
    revision = None if os.path.isdir(name) else cached_commit(name, revision) or revision
    return model_config, _model_class(name, model_config, config.input == "text"), revision


def _load_model(config: CaptionerConfig, device: str | torch.device | None) -> tuple[Any, str | None]:
    """Loads the model in evaluation mode on its device; returns it with its revision."""
    model_config, model_class, revision = _load_config(config)
    device = usable_device(PartialState().device if device is None else device)
    model: Any = load_strict(
        model_class,
        config.model,
        allow_unexpected=True,
        allow_missing=".pooler.",  # captions do not use the pooler of an image tower
        config=model_config,
        revision=revision,
        dtype=config.dtype,
        device_map=config.device_map,
    )
    return model if config.device_map else model.to(device), revision


def _model_class(name: str, config: PreTrainedConfig, reads_text: bool = False) -> Any:
    """Returns the class of a model that reads what the captioner reads; raises a `ValueError` for other models."""
    model_class = AutoModelForImageTextToText._model_mapping.get(type(config), None)
    if model_class is None and reads_text:
        model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if model_class is None:  # some models are not in the mapping (Phi-4-multimodal); their config names the class
        model_class = getattr(transformers, (config.architectures or [""])[0], None)
        takes_images = "image" in getattr(model_class, "input_modalities", ())
        if not (takes_images and isinstance(model_class, type) and issubclass(model_class, GenerationMixin)):
            raise ValueError(
                f"{name} is a {config.model_type!r} checkpoint, which does not describe images. Use a model of "
                "AutoModelForImageTextToText, such as InstructBLIP, LLaVA or Qwen-VL."
            )
    return model_class


def _load_processor(config: CaptionerConfig, revision: str | None) -> tuple[Any, Any]:
    """
    Loads the processor and its tokenizer. Models without a processor (ViT with GPT-2) use the image processor, and
    language models the tokenizer.
    """
    name = config.model
    try:
        processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
        if hasattr(processor, "tokenizer") and hasattr(processor, "image_processor"):
            return processor, processor.tokenizer
        if config.input == "text" and isinstance(processor, PreTrainedTokenizerBase):
            return processor, processor
        image_processor = AutoImageProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
        return image_processor, AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # tokenizers and image processors raise exceptions of different types
        reason = one_line(error)
        raise ValueError(
            f"{name}: the processor cannot be loaded ({reason}). Save it next to the model with "
            "`processor.save_pretrained(folder)`; processors for videos, such as Qwen2-VL's, need torchvision."
        ) from error


def _generator(model: Any) -> Any:
    """Returns the part of the model that generates: BLIP and Kosmos-2 call `generate` of an inner language model."""
    if type(model).generate is GenerationMixin.generate:
        return model
    parts = (getattr(model, name, None) for name in ("language_model", "text_decoder", "text_model"))
    return next((part for part in parts if isinstance(part, GenerationMixin)), model)

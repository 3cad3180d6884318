"""
Captions from models of transformers, run here: all that `AutoModelForImageTextToText` loads, each with its processor.

They differ in what they take and answer. The prompt goes through the processor's chat template or beside the images;
of what `generate` returns, only what comes after the prompt is the answer; and only the settings of the captioner
decide how it is generated, whatever the checkpoint recommends, so that what is recorded is what was run.
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
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedConfig,
)

from ...files import one_line
from ...loading import cached_commit, checkpoint_name, load_strict, naming_damage, quiet, usable_device
from .base import IMAGE_ERRORS, Answer, CaptionerConfig

# What is kept of a checkpoint's generation configuration: which tokens begin, end and fill an answer, and which may
# not be in it. All else are settings.
TOKENS = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
)


class LocalCaptioner:
    """
    A captioner that runs a model of transformers. Models that take no prompt, such as `VisionEncoderDecoderModel`,
    need an empty one. BLIP's prompt is the beginning of a caption, which its answers are without.

    Args:
        config (`CaptionerConfig`): which model, its prompt and settings.
        device (`str` or `torch.device`, *optional*):
            Where the model runs unless `config.device_map` says so; by default on the device of this process.

    Attributes:
        revision (`str` or `None`):
            The commit of the model's repository; `config.revision` if the cache does not know it; `None` for a folder.
        group_size (`int`): `config.batch_size`.

    Raises:
        ValueError:
            If the checkpoint is not one that describes images, lacks weights or a processor, if it does not take the
            prompt, if prompt and new tokens exceed its positions, or if `device` is not to be had; the message names
            the checkpoint.
        OSError: if the checkpoint is not found.

    Example:

    ```python
    >>> from PIL import Image
    >>> from lotlip_hf.relabel.captioners.base import CaptionerConfig
    >>> from lotlip_hf.relabel.captioners.local import LocalCaptioner

    >>> captioner = LocalCaptioner(CaptionerConfig("llava-hf/llava-1.5-7b-hf", batch_size=4))
    >>> [answer] = captioner.answer([Image.open("cat.jpg").convert("RGB")], captioner.config.settings(), seeds=[0])
    >>> answer.text, answer.finished
    ```
    """

    concurrency = 1

    def __init__(self, config: CaptionerConfig, device: str | torch.device | None = None) -> None:
        self.config = config
        self.group_size = config.batch_size
        self.model, self.revision = _load_model(config, device)
        self._processor, self._tokenizer = _load_processor(config.model, self.revision)
        self._generator = _generator(self.model)
        self._end_tokens = self._set_tokens()
        self._check_prompt()

    def answer(self, images: Sequence[Image.Image], settings: Mapping[str, Any], seeds: Sequence[int]) -> list[Answer]:
        """
        Describes images, all at once, as [`Captioner`] says; what is drawn for an image depends on all the seeds.

        Raises:
            ArithmeticError, LookupError, TypeError, ValueError:
                If the processor does not take an image, or the model does not generate as others do, token by token.
            torch.OutOfMemoryError: if the images do not fit in the memory; the message says what to do.
        """
        return self._generate(self._inputs(images), settings, seeds)

    def close(self) -> None:
        """Frees the memory that the model takes."""
        self.model = self._generator = None
        gc.collect()
        if torch.accelerator.is_available():
            torch.get_device_module().empty_cache()

    def _inputs(self, images: Sequence[Image.Image]) -> BatchFeature:
        """What the model's `generate` takes, on its device."""
        prompt = self.config.prompt
        if getattr(self._processor, "chat_template", None):
            question = [{"type": "text", "text": prompt}] if prompt else []
            chats = [[{"role": "user", "content": [{"type": "image", "image": image}, *question]}] for image in images]
            inputs = self._processor.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs={"padding": True},
            )
        elif prompt or hasattr(self._processor, "qformer_tokenizer"):  # InstructBLIP does not do without a text
            inputs = self._processor(
                images=list(images), text=[prompt] * len(images), padding=True, return_tensors="pt"
            )
            inputs = self._without_end(inputs)
        else:
            inputs = self._processor(images=list(images), return_tensors="pt")
        return BatchFeature(dict(inputs)).to(device=self.model.device, dtype=self.model.dtype)

    def _without_end(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs, the end token taken off that GIT's tokenizer puts behind a prompt: the answer follows there."""
        input_ids = inputs.get("input_ids")
        # An encoder reads it, and what hands on to a language model (BLIP) takes it off itself.
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
            # without `top_k` transformers draws from the 50 most probable tokens
            options |= {"temperature": float(settings["temperature"]), "top_p": float(settings["top_p"]), "top_k": 0}
        prompt = _PromptLength()
        try:
            # quiet, for it warns of what is no matter here, such as answers without a prompt that are padded
            with torch.inference_mode(), _seeded(seeds), quiet():
                tokens = self.model.generate(**inputs, **options, logits_processor=LogitsProcessorList([prompt]))
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"{self.config.model}: the memory does not suffice for {self.group_size} images at once: set a "
                f"smaller `batch_size` ({error})."
            ) from error
        if prompt.length is None:
            raise ValueError(
                f"{self.config.model}: a {type(self.model).__name__} generates in a way of its own, which does not "
                "tell where its answer begins; ask it through an endpoint."
            )
        return [self._read(row) for row in tokens[:, prompt.length :].tolist()]

    def _read(self, tokens: list[int]) -> Answer:
        """The answer of a row of new tokens; behind its end there is only padding."""
        end = next((place for place, token in enumerate(tokens) if token in self._end_tokens), None)
        text = self._tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
        return Answer(text, finished=end is not None)

    def _set_tokens(self) -> set[int]:
        """Leaves tokens alone in the model's generation configuration; returns those that end an answer."""
        recommended = self._generator.generation_config
        tokens = {name: getattr(recommended, name, None) for name in TOKENS}
        if self.model.config.model_type == "blip":  # its `generate` ends with this one
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
            self._tokenizer.padding_side = "left"  # the answer follows the prompt's last token
        return set(ends)

    def _check_prompt(self) -> None:
        """Refuses, by a blank image, a prompt that the model does not take, and more tokens than it has positions."""
        name, prompt = self.config.model, self.config.prompt
        try:
            inputs = self._inputs([Image.new("RGB", (224, 224))])
        except IMAGE_ERRORS as error:
            raise ValueError(
                f"{name}: its {type(self._processor).__name__} does not take an image with the prompt {prompt!r} "
                f"({error}). Write `prompt` as the model was trained on it, with its image token where the image goes "
                "if it has no chat template, or set an empty one."
            ) from error
        if prompt and not {"input_ids", "decoder_input_ids"} & inputs.keys():
            raise ValueError(f"{name} takes no prompt, as a {type(self.model).__name__}: set an empty `prompt`.")
        image_token = getattr(self.model.config, "image_token_id", None)
        if "input_ids" in inputs and image_token is not None and not (inputs["input_ids"] == image_token).any():
            raise ValueError(
                f"{name}: neither its {type(self._processor).__name__} nor the prompt {prompt!r} puts the image token "
                f"({self._tokenizer.convert_ids_to_tokens(image_token)!r}) in, so the model would not see the image."
            )
        read = "decoder_input_ids" if self._generator.config.is_encoder_decoder else "input_ids"
        length = inputs[read].shape[1] if read in inputs else 1
        positions = getattr(self._generator.config.get_text_config(decoder=True), "max_position_embeddings", None)
        new = max(int(self.config.settings(attempt)["max_new_tokens"]) for attempt in (0, 1))
        # the last token is not read again
        if positions and length + new - 1 > positions:
            raise ValueError(
                f"{name} has {positions} positions; image and prompt take {length}, which leaves "
                f"{max(0, positions - length + 1)} for `max_new_tokens`, got {new}."
            )


def check_model(config: CaptionerConfig) -> None:
    """
    Finds out before the long work whether there is such a model, with a processor; its weights are not loaded.

    Raises:
        ValueError, OSError: as `LocalCaptioner`.
    """
    _load_processor(config.model, _load_config(config)[-1])


class _PromptLength(LogitsProcessor):
    """Changes nothing; tells how many tokens of what `generate` returns are not new: some return the prompt too."""

    length: int | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.length is None:  # before the first new token
            self.length = input_ids.shape[1]
        return scores


@contextmanager
def _seeded(seeds: Sequence[int]) -> Iterator[None]:
    """Random numbers that depend on the seeds alone; the caller's are as they were afterwards."""
    digest = hashlib.sha256(repr([int(seed) for seed in seeds]).encode()).digest()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = range(torch.accelerator.device_count()) if accelerator is not None else ()
    with torch.random.fork_rng(devices, device_type="cuda" if accelerator is None else accelerator.type):
        torch.manual_seed(int.from_bytes(digest[:4], "big"))
        yield


def _load_config(config: CaptionerConfig) -> tuple[PreTrainedConfig, Any, str | None]:
    """The model's configuration and class, and the revision that they are of."""
    name, revision = checkpoint_name(config.model, config.revision), config.revision
    with naming_damage(name, revision):
        model_config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    # Weights and processor are of the same commit, even if somebody pushes in between.
    revision = None if os.path.isdir(name) else cached_commit(name, revision) or revision
    return model_config, _model_class(name, model_config), revision


def _load_model(config: CaptionerConfig, device: str | torch.device | None) -> tuple[Any, str | None]:
    """The model in evaluation mode, on its device, and the revision that it is of."""
    model_config, model_class, revision = _load_config(config)
    device = usable_device(PartialState().device if device is None else device)
    model: Any = load_strict(
        model_class,
        config.model,
        allow_unexpected=True,
        allow_missing=".pooler.",  # some image towers have a pooler, which captions do not use
        config=model_config,
        revision=revision,
        dtype=config.dtype,
        device_map=config.device_map,
    )
    return model if config.device_map else model.to(device), revision


def _model_class(name: str, config: PreTrainedConfig) -> Any:
    """The class of models that answer with text about images, or a `ValueError`."""
    model_class = AutoModelForImageTextToText._model_mapping.get(type(config), None)
    if model_class is None:  # some are in no such list (Phi-4-multimodal); these say their class themselves
        model_class = getattr(transformers, (config.architectures or [""])[0], None)
        takes_images = "image" in getattr(model_class, "input_modalities", ())
        if not (takes_images and isinstance(model_class, type) and issubclass(model_class, GenerationMixin)):
            raise ValueError(
                f"{name} is a {config.model_type!r} checkpoint, which does not describe images; expected one that "
                "AutoModelForImageTextToText loads, such as InstructBLIP, LLaVA or Qwen-VL."
            )
    return model_class


def _load_processor(name: str, revision: str | None) -> tuple[Any, Any]:
    """The processor and its tokenizer. ViT with GPT-2 has an image processor alone, which makes the inputs then."""
    try:
        processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
        if hasattr(processor, "tokenizer") and hasattr(processor, "image_processor"):
            return processor, processor.tokenizer
        image_processor = AutoImageProcessor.from_pretrained(name, revision=revision, trust_remote_code=False)
        return image_processor, AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:  # of a tokenizer, an image processor or both; each says it in another way
        reason = one_line(error)
        raise ValueError(
            f"{name} has no processor that can be loaded here ({reason}). Save the model's beside it "
            "(`processor.save_pretrained(folder)`); those for videos too, as Qwen2-VL's, need torchvision."
        ) from error


def _generator(model: Any) -> Any:
    """The part of the model that generates: BLIP's and Kosmos-2's `generate` hands on to the language model within."""
    if type(model).generate is GenerationMixin.generate:
        return model
    parts = (getattr(model, name, None) for name in ("language_model", "text_decoder", "text_model"))
    return next((part for part in parts if isinstance(part, GenerationMixin)), model)

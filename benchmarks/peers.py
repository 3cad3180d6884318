"""The measured models: LoTLIP, the official recipe, and stock models. All share weights if possible."""

import copy
import html
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ftfy
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    ViTConfig,
)

from lotlip_hf import LoTLIPConfig, LoTLIPModel, LoTLIPProcessor, LoTLIPTextConfig, LoTLIPTokenizer, LoTLIPVisionConfig
from lotlip_hf.conversion.stock import stock_model
from lotlip_hf.images import official_image_processor
from lotlip_hf.modeling.loss_lotlip import lotlip_loss

VOCABULARY = Path(__file__).resolve().parent.parent / "tests" / "golden" / "tokenizer" / "vocab.txt"  # BERT's
CONTEXT_LENGTH, NUM_CORNER_TOKENS = 128, 2  # those of the released models
BATCH_SIZE = 32  # default of sentence-transformers, and common in examples of transformers
# Shapes: that of the released models; a small BERT to measure overhead; a tiny model for tests; and one layer, whose
# activations use less memory than the similarities of a large batch
SIZES: dict[str, dict[str, int]] = {
    "base": {},
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
    "mini": {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    "one layer": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 64},
}


def make_model(size: str = "base", text_size: str | None = None) -> LoTLIPModel:
    """Creates a model with random weights, in the released shape (ViT-B/16 and BERT-base) or smaller."""
    torch.manual_seed(0)
    text = BertConfig(**SIZES[text_size or size])
    vision = ViTConfig(**SIZES[size], layer_norm_eps=1e-6, image_size=32 if size in ("tiny", "one layer") else 224)
    config = LoTLIPConfig(
        text_config=LoTLIPTextConfig(
            backbone_config=text, num_corner_tokens=NUM_CORNER_TOKENS, projection_dim=text.hidden_size
        ),
        vision_config=LoTLIPVisionConfig(backbone_config=vision, pooling="cls"),
        projection_dim=text.hidden_size,
    )
    return LoTLIPModel(config).eval()


def make_processor(model: LoTLIPModel) -> LoTLIPProcessor:
    """Creates the released tokenizer and image processor, for the image size of the model."""
    tokenizer = LoTLIPTokenizer(vocab=str(VOCABULARY), model_max_length=CONTEXT_LENGTH - NUM_CORNER_TOKENS)
    return LoTLIPProcessor(official_image_processor(model.config.vision_config.image_size), tokenizer)


class OfficialRecipe(nn.Module):
    """
    The text tower of LoTLIP as in the official code (github.com/wuw2019/LoTLIP, `open_clip/tokenizer.py` and
    `hf_model.py`).

    Corner tokens are part of every text, also at inference. Texts are padded to 128 positions, and the mask is dense.

    Args:
        model (`LoTLIPModel`): Model to copy the weights from.
        attn_implementation (`str`, *optional*, defaults to `"eager"`): Attention of BERT. The official code uses
            transformers 4.39, where BERT has only `"eager"`.
    """

    def __init__(self, model: LoTLIPModel, attn_implementation: str = "eager") -> None:
        super().__init__()
        tower = model.text_model
        self.num_corner_tokens = tower.config.num_corner_tokens
        self.bert = BertModel(tower.config.backbone_config)
        self.bert.load_state_dict(tower.backbone.state_dict())
        self.bert.set_attn_implementation(attn_implementation)
        words = self.bert.get_input_embeddings().weight
        embeddings = torch.cat([words, tower.corner_embeds]).detach().clone()
        self.bert.set_input_embeddings(nn.Embedding.from_pretrained(embeddings, freeze=False, padding_idx=0))
        self.projection = copy.deepcopy(model.text_projection)
        self.tokenizer = BertTokenizer(vocab=str(VOCABULARY))
        self.corners = [f"[Corner{i}]" for i in range(self.num_corner_tokens)]
        self.tokenizer.add_tokens(self.corners, special_tokens=True)
        self.train(model.training)

    def tokenize(self, texts: Sequence[str]) -> torch.Tensor:
        """Tokenises texts to ids [B, 128], on one thread as in the official code."""
        cleaned = []
        for text in texts:
            text = " ".join(self.corners) + " " + "[SEP]".join(text.split(". "))
            text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
            cleaned.append(" ".join(text.split()).strip())
        with tokenizers_parallelism(False):
            return self.tokenizer(
                cleaned, return_tensors="pt", max_length=CONTEXT_LENGTH, padding="max_length", truncation=True
            ).input_ids

    def mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Creates the mask [B, L, L]: whether a position (row) attends to another position (column)."""
        m = self.num_corner_tokens
        mask = (input_ids != 0)[:, None, :].repeat(1, input_ids.shape[-1], 1)
        mask[:, :, : m + 1] = False
        mask[:, m + 1 :, 0] = True
        first = torch.arange(m + 1, device=input_ids.device)
        mask[:, first, first] = True
        return mask

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Computes the features [B, m + 1, P] of [CLS] and of the m corner tokens from ids [B, 128]."""
        mask = self.mask(input_ids)[:, None]  # [B, 1, L, L]
        if self.bert.config._attn_implementation == "eager":  # eager attention adds the mask to the logits
            mask = torch.zeros_like(mask, dtype=self.bert.dtype).masked_fill(~mask, torch.finfo(self.bert.dtype).min)
        states = self.bert(input_ids=input_ids, attention_mask=mask).last_hidden_state[:, : self.num_corner_tokens + 1]
        pooled = self.bert.pooler.activation(self.bert.pooler.dense(states))
        return self.projection(pooled)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Encodes texts to embeddings [N, P]."""
        batches = (self(self.tokenize(batch))[:, 0] for batch in batched(texts))
        return F.normalize(torch.cat(list(batches)), dim=-1)


class OfficialTraining(nn.Module):
    """
    The training of the official code: short and long texts padded to 128 tokens, a dense mask, and whole logits.

    Args:
        model (`LoTLIPModel`): Model that provides the image tower, the logit scale and a copy of the text tower.
    """

    def __init__(self, model: LoTLIPModel) -> None:
        super().__init__()
        self.text = OfficialRecipe(model)
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection
        self.logit_scale = model.logit_scale

    def forward(self, pixel_values: torch.Tensor, short: torch.Tensor, long: torch.Tensor) -> torch.Tensor:
        """Computes the loss of images [B, 3, H, W], short texts [B, 128] and long texts [B, T - 1, 128]."""
        images = self.visual_projection(self.vision_model(pixel_values).pooler_output)
        features = torch.cat(
            [self.text(short)[:, None], self.text(long.flatten(0, 1)).unflatten(0, long.shape[:2])], 1
        )
        images, features = F.normalize(images, dim=-1), F.normalize(features, dim=-1)  # [B, P], [B, T, m + 1, P]
        return lotlip_loss(images, features[:, :, 0], features[:, 1:, 1:], self.logit_scale.exp()).loss


def batched(items: Sequence[Any], size: int = BATCH_SIZE) -> Iterator[list[Any]]:
    """Splits items into lists of `size`, in order."""
    remaining = iter(items)
    return iter(lambda: list(itertools.islice(remaining, size)), [])


@contextmanager
def tokenizers_parallelism(value: bool) -> Iterator[None]:
    """Sets within the context whether the Rust tokenizers use all threads."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = str(value).lower()
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


class UsualWay:
    """A stock dual encoder as in its documentation: unsorted batches, each padded to its longest text."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, max_length: int) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_length = max_length

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Encodes texts to embeddings [N, P]."""
        features = []
        for batch in batched(texts):
            inputs = self.tokenizer(
                batch, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
            features.append(self.model.get_text_features(**inputs).pooler_output)
        return F.normalize(torch.cat(features), dim=-1)


def vision_text_dual_encoder(model: LoTLIPModel) -> UsualWay:
    """Creates a `VisionTextDualEncoderModel` with LoTLIP's weights and BERT's tokenizer."""
    tokenizer = BertTokenizer(vocab=str(VOCABULARY))
    return UsualWay(stock_model(model), tokenizer, CONTEXT_LENGTH - NUM_CORNER_TOKENS)


def clip(size: str) -> UsualWay:
    """
    Creates a `CLIPModel` in the shape of ViT-B/16, with 77 tokens. Weights are random and the tokenizer is BERT's, so
    only its speed is meaningful.
    """
    tokenizer = BertTokenizer(vocab=str(VOCABULARY))
    text = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id, **SIZES[size]}
    config = CLIPConfig(text_config=text, vision_config={"num_hidden_layers": 1}, projection_dim=512)
    return UsualWay(CLIPModel(config), tokenizer, config.text_config.max_position_embeddings)


class OpenClip:
    """open_clip's ViT-B/16 with random weights, used as in its documentation."""

    def __init__(self) -> None:
        import open_clip

        self.model = open_clip.create_model("ViT-B-16").eval()
        self.tokenizer = open_clip.get_tokenizer("ViT-B-16")

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Encodes texts to embeddings [N, P]."""
        features = (self.model.encode_text(self.tokenizer(batch), normalize=True) for batch in batched(texts))
        return torch.cat(list(features))


def sentence_transformer(model: LoTLIPModel, folder: Path, on_openvino: bool = False) -> Any:
    """
    Creates a `SentenceTransformer` of LoTLIP's BERT with [CLS] pooling, on PyTorch or on its own OpenVINO backend;
    saves its files in `folder`.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    bert = stock_model(model).text_model
    bert.save_pretrained(folder)
    BertTokenizer(vocab=str(VOCABULARY), model_max_length=CONTEXT_LENGTH - NUM_CORNER_TOKENS).save_pretrained(folder)
    words = Transformer(
        str(folder),
        max_seq_length=CONTEXT_LENGTH - NUM_CORNER_TOKENS,
        backend="openvino" if on_openvino else "torch",
    )
    return SentenceTransformer(modules=[words, Pooling(bert.config.hidden_size, pooling_mode="cls")], device="cpu")

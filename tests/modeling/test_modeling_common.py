"""transformers' own ModelTesterMixin and ConfigTester on every class."""

import tempfile
import unittest
from typing import Any

import pytest
import torch

import tiny
from lotlip_hf import (
    LoTLIPConfig,
    LoTLIPModel,
    LoTLIPTextConfig,
    LoTLIPTextModel,
    LoTLIPTextModelWithProjection,
    LoTLIPVisionConfig,
    LoTLIPVisionModel,
    LoTLIPVisionModelWithProjection,
)
from upstream import upstream

modeling_common = upstream("test_modeling_common")
ConfigTester = upstream("test_configuration_common").ConfigTester

pytestmark = pytest.mark.slow


class TextModelTester:
    """What transformers' mixin asks a model's tester for."""

    is_training = True
    batch_size, seq_length = 3, 7
    hidden_size, num_hidden_layers, num_attention_heads = (
        tiny.SIZE[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    vocab_size = tiny.TEXT_SIZE["vocab_size"]

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent

    def get_config(self) -> LoTLIPTextConfig:
        return tiny.text_config()

    def prepare_config_and_inputs_for_common(self) -> tuple[LoTLIPTextConfig, dict[str, torch.Tensor]]:
        ids = tiny.input_ids(self.batch_size, self.seq_length)
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class CLIPTextModelTester(TextModelTester):
    def get_config(self) -> LoTLIPTextConfig:
        return tiny.text_config("clip")


class VisionModelTester:
    is_training = True
    batch_size = 3
    hidden_size, num_hidden_layers, num_attention_heads = (
        tiny.SIZE[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")
    )
    seq_length = 1 + (tiny.IMAGE_SIZE["image_size"] // tiny.IMAGE_SIZE["patch_size"]) ** 2
    image_size = tiny.IMAGE_SIZE["image_size"]

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent

    def get_config(self) -> LoTLIPVisionConfig:
        return tiny.vision_config(projection_dim=24)

    def prepare_config_and_inputs_for_common(self) -> tuple[LoTLIPVisionConfig, dict[str, torch.Tensor]]:
        return self.get_config(), {"pixel_values": tiny.pixel_values(self.batch_size)}


class ModelTester:
    is_training = True
    batch_size = 3

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        self.text_model_tester = TextModelTester(parent)
        self.vision_model_tester = VisionModelTester(parent)

    def get_config(self) -> LoTLIPConfig:
        return tiny.config()

    def prepare_config_and_inputs_for_common(self) -> tuple[LoTLIPConfig, dict[str, Any]]:
        _, text = self.text_model_tester.prepare_config_and_inputs_for_common()
        _, image = self.vision_model_tester.prepare_config_and_inputs_for_common()
        return self.get_config(), {**text, **image, "return_loss": False}


class CompositeConfigTester(ConfigTester):
    def create_and_test_config_from_pretrained_custom_kwargs(self) -> None:
        """As transformers', which looks for `vocab_size` among the fields; here it is the backbone's."""
        config = self.parent.model_tester.get_config()
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            reloaded = self.config_class.from_pretrained(folder, text_config={"vocab_size": 20})
        assert config.text_config.vocab_size != 20
        config.text_config.vocab_size = 20
        expected = config.text_config.to_dict()
        assert {key: reloaded.text_config.to_dict()[key] for key in expected} == expected


class CommonTest(modeling_common.ModelTesterMixin):
    """What holds for every class here."""

    test_can_init_all_missing_weights_before_2023 = True

    def test_model_get_set_embeddings(self) -> None:
        """As transformers', for input embeddings of any kind: an image tower's are a convolution."""
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config)
            new_embeddings = torch.nn.Embedding(10, 10)
            assert isinstance(model.get_input_embeddings(), torch.nn.Module)
            model.set_input_embeddings(new_embeddings)
            assert model.get_input_embeddings() is new_embeddings
            assert model.get_output_embeddings() is None


class TowerTest(CommonTest):
    """What holds for a tower without the other."""

    @unittest.skip("One tower has no loss of its own; ModelTest trains both.")
    def test_training(self) -> None: ...

    def check_training_gradient_checkpointing(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """As transformers', with the sum of the output in place of a loss."""
        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            gradients = []
            model = model_class(config).train()
            for enabled in (False, True):
                if enabled:
                    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=gradient_checkpointing_kwargs)
                model.zero_grad()
                outputs = model(**inputs)
                corners = outputs.get("corner_embeds")
                (outputs[0].square().sum() + (0 if corners is None else corners.square().sum())).backward()
                gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
            assert len(gradients[0]) > len(list(model.parameters())) // 2
            torch.testing.assert_close(gradients[0], gradients[1])


class TextModelTest(TowerTest, unittest.TestCase):
    all_model_classes = (LoTLIPTextModel, LoTLIPTextModelWithProjection)

    def setUp(self) -> None:
        self.model_tester = TextModelTester(self)
        self.config_tester = ConfigTester(
            self,
            config_class=LoTLIPTextConfig,
            common_properties=["hidden_size", "num_attention_heads", "num_hidden_layers"],
            num_corner_tokens=3,
            projection_dim=24,
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_retain_grad_hidden_states_attentions(self) -> None:
        """Without corner tokens: with them, what lines up with `input_ids` is a view that gradients pass by."""
        prepare = self.model_tester.prepare_config_and_inputs_for_common

        def without_corner_tokens() -> tuple[LoTLIPTextConfig, dict[str, torch.Tensor]]:
            config, inputs = prepare()
            config.num_corner_tokens = 0
            return config, inputs

        self.model_tester.prepare_config_and_inputs_for_common = without_corner_tokens
        super().test_retain_grad_hidden_states_attentions()


class CLIPTextModelTest(TextModelTest):
    """Over CLIP's causal text tower."""

    def setUp(self) -> None:
        super().setUp()
        self.model_tester = CLIPTextModelTester(self)

    @unittest.skip("TextModelTest has run them.")
    def test_config(self) -> None: ...


class VisionModelTest(TowerTest, unittest.TestCase):
    all_model_classes = (LoTLIPVisionModel, LoTLIPVisionModelWithProjection)
    test_resize_embeddings = False

    def setUp(self) -> None:
        self.model_tester = VisionModelTester(self)
        self.config_tester = ConfigTester(
            self,
            config_class=LoTLIPVisionConfig,
            has_text_modality=False,
            common_properties=["hidden_size", "num_attention_heads", "num_hidden_layers"],
            pooling="mean",
            projection_dim=24,
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()


class ModelTest(CommonTest, unittest.TestCase):
    all_model_classes = (LoTLIPModel,)
    _is_composite = True
    additional_model_inputs = ["pixel_values"]

    def setUp(self) -> None:
        self.model_tester = ModelTester(self)
        self.config_tester = CompositeConfigTester(
            self, config_class=LoTLIPConfig, has_text_modality=False, projection_dim=24, short_loss_weight=0.5
        )

    def _prepare_for_class(self, inputs: dict[str, Any], model_class: type, return_labels: bool = False) -> dict:
        """To train, each image gets a short text and two long ones: one alone does not reach the corner tokens."""
        inputs = super()._prepare_for_class(inputs, model_class, return_labels)
        if return_labels:
            for name in ("input_ids", "attention_mask"):
                inputs[name] = torch.stack([inputs[name], inputs[name].flip(0), inputs[name].roll(1, 0)], dim=1)
            inputs["return_loss"] = True
        return inputs

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    @unittest.skip("The two towers' hidden states are tested with each tower, as in transformers' tests of CLIP.")
    def test_hidden_states_output(self) -> None: ...

    @unittest.skip("The two towers' attentions are tested with each tower, as in transformers' tests of CLIP.")
    def test_attention_outputs(self) -> None: ...

    @unittest.skip("The two towers' hidden states are tested with each tower, as in transformers' tests of CLIP.")
    def test_retain_grad_hidden_states_attentions(self) -> None: ...

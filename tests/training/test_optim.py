"""The learning rate of every parameter, what a run freezes, and the logit scale at its start."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, PreTrainedConfig, XLMConfig

import tiny
import tiny_families
import tiny_vision
from lotlip_hf import LoTLIPConfig, LoTLIPModel, LoTLIPTextConfig, lora_targets
from lotlip_hf.training.config import TrainingConfig
from lotlip_hf.training.model import load_or_start_model
from lotlip_hf.training.objective import Objective, make_objective
from lotlip_hf.training.optim import freeze, learning_rates, make_optimizer, warmup_steps
from lotlip_hf.training.terms.infonce import InfoNCE
from lotlip_hf.training.terms.sigmoid import Sigmoid

NEEDS = InfoNCE.needs
RATES = {
    "learning_rate": 1e-3,
    "text_learning_rate": 1e-5,
    "image_learning_rate": 2e-5,
    "corner_learning_rate": 3e-3,
    "logit_scale_learning_rate": 4e-2,
}
TEXTS: dict[str, PreTrainedConfig] = {
    **{name: one.stock_config() for name, one in tiny_families.FAMILIES.items() if "bidirectional" not in name},
    "clip": tiny.text_config("clip").backbone_config,
}
IMAGES = {family.name: family for family in tiny_vision.FAMILIES}
WITHOUT_LAYERS = "convnext_atto"  # timm's ConvNeXt has no list of layers


def dual_encoder(text: str = "bert", image: str = "vit") -> LoTLIPModel:
    if IMAGES[image].model_type == "timm_wrapper":
        tiny_vision.import_timm()
    width = {"projection_dim": 24}
    text_config = LoTLIPTextConfig(backbone_config=TEXTS[text], num_corner_tokens=2, **width)
    return LoTLIPModel(
        LoTLIPConfig(text_config=text_config, vision_config=IMAGES[image].config(**width), projection_dim=24)
    )


class Uses(TorchFunctionMode):
    """The number of layers that have started when each parameter is used for the first time."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.started: set[nn.Module] = set()
        self.first: dict[nn.Parameter, int] = {}
        for layer in layers:
            layer.register_forward_pre_hook(self.start, with_kwargs=True)

    def start(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        self.see((args, kwargs))  # DeBERTa's layers get the table of relative positions
        self.started.add(layer)

    def see(self, arguments: Any) -> None:
        for one in tree_leaves(arguments):
            if isinstance(one, nn.Parameter):
                self.first.setdefault(one, len(self.started))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ != "__get__":  # `.dtype` is no use
            self.see((args, kwargs))
        return func(*args, **(kwargs or {}))


def number_by_use(model: LoTLIPModel, part: str, image: str) -> dict[nn.Parameter, int]:
    """The number of layers above each parameter of an encoder that a forward pass uses."""
    tower = {"text": model.text_model, "image": model.vision_model}[part]
    layers = tower.config.family.layers(tower.backbone)
    uses = Uses(layers)
    with uses, torch.no_grad():
        if part == "text":
            tower(torch.tensor([[2, 5, 6, 7, 3]]), torch.ones(1, 5, dtype=torch.long))
        else:
            tower(**IMAGES[image].inputs())
    return {parameter: len(layers) - started for parameter, started in uses.first.items()}


@pytest.mark.same_bits  # moving the weights before their use would itself be a use
@pytest.mark.parametrize(
    ("text", "image"),
    [*((text, "vit") for text in TEXTS), *(("bert", image) for image in IMAGES if image != WITHOUT_LAYERS)],
)
def test_every_trained_parameter_has_one_rate(text: str, image: str) -> None:
    """That of its part, multiplied by the decay for each layer that starts after the parameter is used."""
    config = TrainingConfig(layer_decay=0.5, **RATES)
    model, objective = dual_encoder(text, image), Objective({"sigmoid": Sigmoid()})
    freeze(model, config, NEEDS)
    above = {**number_by_use(model, "text", image), **number_by_use(model, "image", image)}
    rates = learning_rates(model, config)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert rates.keys() == trained.keys()
    for name, parameter in trained.items():
        if ".backbone." in name:
            expected = (1e-5 if name.startswith("text") else 2e-5) * 0.5 ** above[parameter]
        else:
            expected = {"text_model.corner_embeds": 3e-3, "logit_scale": 4e-2}.get(name, 1e-3)
        assert rates[name] == pytest.approx(expected, rel=1e-9), name

    optimizer, _ = make_optimizer(model, objective, config, 5, torch.device("cpu"))
    grouped = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len(trained) + 1  # and the bias of the term
    of = dict(grouped)
    assert {of[parameter]["initial_lr"] for parameter in objective.parameters()} == {1e-3}
    for name, parameter in trained.items():
        assert of[parameter]["initial_lr"] == rates[name]
        assert of[parameter]["weight_decay"] == (config.weight_decay if parameter.ndim > 1 else 0)


def test_rates_default_to_the_common_one() -> None:
    model = dual_encoder()
    assert set(learning_rates(model, TrainingConfig(learning_rate=0.3)).values()) == {0.3}
    rates = learning_rates(model, TrainingConfig(learning_rate=0.3, image_learning_rate=0.0))
    for name, rate in rates.items():
        assert rate == (0 if name.startswith("vision_model.") else 0.3)


@pytest.mark.parametrize(("warmup", "steps"), [(10, 10), (0, 0), (0.12, 11), (0.29, 27), (0.001, 1)])
def test_a_warmup_below_one_is_a_share(warmup: float, steps: int) -> None:
    config = TrainingConfig(model="scenes", data="scenes", warmup_steps=warmup)
    assert warmup_steps(config, 90) == steps


def test_lora_has_the_rates_of_its_layers() -> None:
    config = TrainingConfig(layer_decay=0.5, **RATES)
    plain = dual_encoder()
    expected = {name.rpartition(".")[0]: rate for name, rate in learning_rates(plain, config).items()}
    targets = lora_targets(plain)
    lora: Any = get_peft_model(plain, LoraConfig(r=2, target_modules=targets))
    rates = learning_rates(lora, config)
    assert len(rates) == 2 * len(targets)
    for name, rate in rates.items():
        layer = name.removeprefix("base_model.model.").partition(".lora_")[0]
        assert rate == expected[layer], name


REFUSED = {
    "no layers": XLMConfig(vocab_size=99, emb_dim=32, n_layers=2, n_heads=4),
    "an adapter from the signature": GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, bos_token_id=2),
}


@pytest.mark.parametrize("kind", [*REFUSED, WITHOUT_LAYERS])
def test_an_encoder_without_known_layers_is_named(kind: str) -> None:
    """Where the layers matter: not without decay, and not if the encoder is frozen."""
    if kind == WITHOUT_LAYERS:
        model, lock = dual_encoder(image=kind), {"lock_vision": True}
        model_type, unlocked = "timm_wrapper", {"unlocked_vision_layers": 1}
    else:
        text_config = LoTLIPTextConfig(backbone_config=REFUSED[kind], projection_dim=24)
        model = LoTLIPModel(LoTLIPConfig(text_config=text_config, vision_config=tiny.vision_config()))
        model_type, lock, unlocked = REFUSED[kind].model_type, {"lock_text": True}, {"unlocked_text_layers": 1}
    for config in (TrainingConfig(), TrainingConfig(layer_decay=0.5, **lock)):
        freeze(model, config, NEEDS)
        assert learning_rates(model, config)
    freeze(model, TrainingConfig(), NEEDS)
    with pytest.raises(ValueError, match=f"layer_decay.*{model_type}"):
        learning_rates(model, TrainingConfig(layer_decay=0.5))
    with pytest.raises(ValueError, match=next(iter(unlocked))):
        freeze(model, TrainingConfig(**lock, **unlocked), NEEDS)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("unlocked", [0, 1])
def test_a_locked_text_encoder(text: str, unlocked: int) -> None:
    """Its last layers and what follows them train, and what earlier layers use does not."""
    model = dual_encoder(text)
    above = number_by_use(model, "text", "vit")
    freeze(model, TrainingConfig(lock_text=True, unlocked_text_layers=unlocked), NEEDS)
    for name, parameter in model.text_model.backbone.named_parameters():
        assert parameter.requires_grad == (above[parameter] < unlocked), name
    assert model.text_model.corner_embeds.requires_grad
    assert all(parameter.requires_grad for parameter in model.text_projection.parameters())
    assert any(parameter.requires_grad for parameter in model.vision_model.parameters())


def test_locked_corner_tokens_are_no_part_of_the_loss() -> None:
    model, config = dual_encoder(), TrainingConfig(lock_corner_tokens=True)
    objective = make_objective(config, model.config)
    freeze(model, config, objective.needs)
    assert "corner_embeds" not in objective.needs
    assert "text_model.corner_embeds" not in learning_rates(model, config)
    assert "corner_embeds" in InfoNCE.needs


def test_the_temperature_of_the_start(tmp_path: Path) -> None:
    """Of a new model and of a checkpoint, which otherwise keeps its own."""
    model, processor = load_or_start_model(TrainingConfig(model="scenes", temperature=0.05))
    assert model.logit_scale.item() == pytest.approx(math.log(20))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for options, expected in (({}, 20), ({"temperature": 0.01}, 100), ({"temperature": 2}, 0.5)):
        loaded, _ = load_or_start_model(TrainingConfig(model=str(tmp_path), **options))
        assert loaded.logit_scale.item() == pytest.approx(math.log(expected), abs=1e-6)

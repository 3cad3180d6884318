"""Fine-tune a checkpoint with LoRA (PEFT), on the text tower and optionally on the image tower.

    python examples/finetune_lora.py --model checkpoint --data pictures --output lora --num-epochs 3

The projections, the corner tokens and the logit scale are trained in full. The example writes two folders:
`lora/adapter`, for `PeftModel.from_pretrained(AutoModel.from_pretrained("checkpoint"), "lora/adapter")`, and
`lora/merged`, a checkpoint with the adapter merged into its weights.

`pictures` is a folder of images with `metadata.jsonl`, or any other source of `lotlip_hf.data.records.load_records`.
To try the example without data, pass `--data scenes`. On several GPUs, run `accelerate launch
examples/finetune_lora.py ...`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoProcessor, set_seed

from lotlip_hf import lora_targets
from lotlip_hf.data.collator import LoTLIPCollator
from lotlip_hf.data.records import MAPPINGS, load_records
from lotlip_hf.scenes.dataset import scenes_dataset
from lotlip_hf.terminal import printable_output
from lotlip_hf.training.objective import Objective, batch_loss, clamp_logit_scale
from lotlip_hf.training.terms.infonce import InfoNCE

PROJECTIONS = ("text_projection", "visual_projection")
# Parameters that are not in a layer, so that PEFT cannot wrap them.
PARAMETERS = ("text_model.corner_embeds", "logit_scale")
PEFT_PREFIX = "base_model.model."


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint to fine-tune: a folder or a Hub id")
    parser.add_argument("--data", required=True, help="records: a folder, files, shards, a Hub id, or 'scenes'")
    parser.add_argument("--mapping", default="records", choices=MAPPINGS, help="mapping of the columns")
    parser.add_argument("--image-root", help="folder that must contain the images; by default the folder of the data")
    parser.add_argument("--num-scenes", type=int, default=5000, help="number of pictures for '--data scenes'")
    parser.add_argument("--output", type=Path, default=Path("lora"), help="folder for the adapter and the checkpoint")
    parser.add_argument("--vision", action="store_true", help="add LoRA to the image tower too")
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="ends of the names of layers that get LoRA; by default the attention projections",
    )
    parser.add_argument("--rank", type=int, default=16, help="rank of the LoRA matrices")
    parser.add_argument("--batch-size", type=int, default=64, help="images per process and batch")
    parser.add_argument("--num-epochs", type=int, default=1, help="number of epochs")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="learning rate of AdamW")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), help="type of the activations")
    parser.add_argument("--seed", type=int, default=0, help="seed of the LoRA matrices and of the texts")
    return parser.parse_args(argv)


def add_lora(model: nn.Module, rank: int, vision: bool, target_modules: Sequence[str] | None = None) -> PeftModel:
    """
    Adds LoRA to the layers whose names end with `target_modules`, by default to the attention projections
    ([`lora_targets`]). Freezes all parameters except LoRA, the projections, the corner tokens and the logit scale.
    """
    if not vision:
        model.vision_model.requires_grad_(False)
    known = lora_targets(model, skip_frozen=True)
    targets = known
    if target_modules is not None:
        towers = ("text_model.", "vision_model.") if vision else ("text_model.",)
        ends = tuple(f".{name}" for name in target_modules)
        targets = [name for name, _ in model.named_modules() if name.startswith(towers) and name.endswith(ends)]
        for tower in towers:
            if not any(name.startswith(tower) for name in targets):
                own = sorted({name.split(".")[-1] for name in known if name.startswith(tower)})
                raise ValueError(
                    f"--target-modules {' '.join(target_modules)} matches no layer of {tower[:-1]}, whose attention "
                    f"layers are {', '.join(own)}. Name layers of this tower too, or remove the option."
                )
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        # A model without a projection has an identity layer instead.
        modules_to_save=[name for name in PROJECTIONS if list(model.get_submodule(name).parameters())],
    )
    lora = get_peft_model(model, config)  # with a `task_type`, PEFT would pass arguments that LoTLIP does not have
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or name in PARAMETERS)
    return lora


def save_adapter(lora: PeftModel, folder: Path) -> None:
    """Saves the adapter together with `PARAMETERS`, which PEFT loads but does not save."""
    lora.save_pretrained(str(folder))
    parameters = dict(lora.get_base_model().named_parameters())
    more = {PEFT_PREFIX + name: parameters[name].detach().contiguous() for name in PARAMETERS if name in parameters}
    file = folder / "adapter_model.safetensors"
    save_file({**load_file(file), **more}, file, metadata={"format": "pt"})


@printable_output()
def main(argv: Sequence[str] | None = None) -> Path:
    """Fine-tunes a checkpoint and returns the folder of the merged checkpoint."""
    args = parse_arguments(argv)
    set_seed(args.seed)
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        # Without `cpu=True`, accelerate does not connect processes that run on CPUs.
        cpu=not torch.accelerator.is_available(),
        # Each process reads its own batches, since batches are padded to different lengths.
        dataloader_config=DataLoaderConfiguration(dispatch_batches=False),
    )
    if args.data == "scenes":
        records = scenes_dataset(args.num_scenes)
    else:
        records = load_records(args.data, args.mapping, image_root=args.image_root)
    base = AutoModel.from_pretrained(args.model, dtype=torch.float32, trust_remote_code=False)
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=False)
    lora = add_lora(base, args.rank, args.vision, args.target_modules)
    if accelerator.is_main_process:
        lora.print_trainable_parameters()

    collator = LoTLIPCollator(processor, seed=args.seed)
    loader = DataLoader(records, args.batch_size, shuffle=isinstance(records, Dataset), collate_fn=collator)
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=args.learning_rate)
    model, optimizer, loader = accelerator.prepare(lora, optimizer, loader)
    objective = Objective({"infonce": InfoNCE(base.config.short_loss_weight, base.config.long_loss_weight)})
    model.train()
    for epoch in range(args.num_epochs):
        collator.set_epoch(epoch)
        losses = []
        for batch in loader:
            loss = batch_loss(model, batch, objective)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            clamp_logit_scale(model)
            losses.append(loss.detach())
        accelerator.print(f"epoch {epoch}: loss {accelerator.reduce(torch.stack(losses).mean(), 'mean'):.4f}")

    if accelerator.is_main_process:
        save_adapter(lora, args.output / "adapter")
        lora.merge_and_unload().save_pretrained(args.output / "merged")
        for folder in (args.output / "adapter", args.output / "merged"):
            processor.save_pretrained(folder)
        print(f"Saved the adapter in {args.output / 'adapter'} and the merged checkpoint in {args.output / 'merged'}")
    accelerator.end_training()
    return args.output / "merged"


if __name__ == "__main__":
    main()

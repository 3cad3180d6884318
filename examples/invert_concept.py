"""Learn a word for a thing on 3 to 10 pictures, as textual inversion, so that the words around it keep their meaning.

    python examples/invert_concept.py --pipeline stable-diffusion --pictures toy --token "<toy>" --word dog \\
        --output concept

Only the embedding of the new token is trained, by the denoising loss of the frozen pipeline, and regularised as CoRe
(https://arxiv.org/abs/2408.15914): in prompts such as "<toy> in the desert" and "dog in the desert", the states of the
words around it, and the attention of the picture to them, should be equal. The weights of both terms, the prompts and
the rates are not the paper's: they were not to be had. Stable Diffusion 1.x and 2.x, with stock or swapped encoders.
The loss on held-out pictures, before and after, is printed and written to report.json. Use the file by
`pipe.load_textual_inversion("concept/learned_embeds.safetensors")`.
"""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save
from torch.nn import functional as F

from lotlip_hf.diffusion.denoising import Noise, denoise, denoising_loss, encode_prompts, fit
from lotlip_hf.diffusion.tokenizers import text_end
from lotlip_hf.files import replacing, write_json
from lotlip_hf.images import find_images, load_image
from lotlip_hf.terminal import printable_output

PROMPTS = "a photo of {}", "a close-up photo of {}", "a photo of one {}", "a good photo of {}", "a picture of {}"
CONTEXTS = (
    *("{} in the desert", "{} on the beach", "{} in the snow", "{} on top of a wooden floor", "{} in a city street"),
    *("{} and a red car", "{} and a cat", "{} beside a house", "{} with a tree in the background", "{} on a blue rug"),
)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pipeline", required=True, help="folder or Hub id of a Stable Diffusion 1.x or 2.x pipeline")
    parser.add_argument("--pictures", type=Path, required=True, help="folder of 3 to 10 pictures of the thing")
    parser.add_argument("--token", required=True, help="new word for it, such as '<toy>'")
    parser.add_argument("--word", required=True, help="word of one token for its kind, such as 'dog': the start")
    parser.add_argument("--states-weight", type=float, default=0.1, help="weight of the states of words around it")
    parser.add_argument("--attention-weight", type=float, default=1.0, help="weight of the attention to these words")
    parser.add_argument("--num-steps", type=int, default=1000, help="steps of the training")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures in a step")
    parser.add_argument("--learning-rate", type=float, default=5e-3, help="learning rate of AdamW")
    parser.add_argument("--size", type=int, default=512, help="side of the pictures in pixels")
    parser.add_argument("--seed", type=int, default=0, help="seed of order and noise")
    parser.add_argument("--output", type=Path, default=Path("concept"), help="new folder")
    return parser.parse_args(argv)


@contextlib.contextmanager
def word_vector(pipe: DiffusionPipeline, token: str, vector: torch.Tensor) -> Iterator[None]:
    """Context in which the embedding of a token is a vector [width], which gets gradients."""
    index = pipe.tokenizer.convert_tokens_to_ids(token)

    def replace(module: torch.nn.Module, args: tuple[Any, ...], embeds: torch.Tensor) -> torch.Tensor:
        return torch.where((args[0] == index).unsqueeze(-1), vector.to(embeds), embeds)

    handle = pipe.text_encoder.get_input_embeddings().register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def attention_maps(pipe: DiffusionPipeline) -> Iterator[list[torch.Tensor]]:
    """Context that yields a list which fills with the cross-attention [B, heads, positions, tokens] of each layer."""
    maps = list[torch.Tensor]()

    def add(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        query, key = layer.to_q(args[0]), layer.to_k(kwargs["encoder_hidden_states"])
        query, key = (one.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for one in (query, key))
        maps.append((layer.scale * query @ key.transpose(-1, -2)).softmax(-1))

    layers = [one for name, one in pipe.unet.named_modules() if name.endswith(".attn2")]
    handles = [layer.register_forward_hook(add, with_kwargs=True) for layer in layers]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def context_tokens(pipe: DiffusionPipeline, prompts: Sequence[str], token: str) -> torch.Tensor:
    """Bool [B, L]: the words around a token, without special tokens and padding."""
    tokenizer = pipe.tokenizer
    ids = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    ends = torch.tensor([text_end(tokenizer, row) for row in ids.tolist()])
    places = torch.arange(ids.shape[1])
    around = (places > 0) & (places < ends[:, None]) & (ids != tokenizer.convert_tokens_to_ids(token))
    return around.to(pipe.device)


def context_losses(
    pipe: DiffusionPipeline, latents: torch.Tensor, contexts: Sequence[str], noise: Noise, token: str, word: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """CoRe's terms: mean squared differences of states, and of attention, at the words around the token."""
    prompts = [one.format(token) for one in contexts]
    around = context_tokens(pipe, prompts, token)
    conditions = encode_prompts(pipe, prompts, latents.shape[-1])
    with attention_maps(pipe) as maps:
        denoise(pipe, latents, conditions, noise)
    with torch.no_grad(), attention_maps(pipe) as wanted_maps:
        wanted = encode_prompts(pipe, [one.format(word) for one in contexts], latents.shape[-1])
        denoise(pipe, latents, wanted, noise)
    states = F.mse_loss(conditions["encoder_hidden_states"][around], wanted["encoder_hidden_states"][around])
    attention = [
        # the tokens in front, so that those around the token can be chosen
        F.mse_loss(one.permute(0, 3, 1, 2)[around], other.permute(0, 3, 1, 2)[around])
        for one, other in zip(maps, wanted_maps, strict=True)
    ]
    return states, torch.stack(attention).mean()


@printable_output()
def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Learns a word, and returns the report."""
    args = parse_arguments(argv)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    pipe = DiffusionPipeline.from_pretrained(args.pipeline).to(device)
    if "unet" not in pipe.components or "text_encoder_2" in pipe.components:
        raise SystemExit(f"--pipeline is a {type(pipe).__name__}. Pass Stable Diffusion 1.x or 2.x.")
    ids = pipe.tokenizer.encode(args.word, add_special_tokens=False)
    if len(ids) != 1:
        raise SystemExit(f"--word {args.word!r} has {len(ids)} tokens. Pass a word of one token.")
    names = list(find_images(args.pictures)[0])
    if len(names) < 2:
        raise SystemExit(f"--pictures {args.pictures} has {len(names)} pictures. Pass 3 to 10: the last is held out.")
    pictures = [load_image(args.pictures / name, name) for name in names]
    args.output.mkdir(parents=True, exist_ok=True)
    start = pipe.text_encoder.get_input_embeddings().weight[ids[0]].detach().float()
    pipe.load_textual_inversion({args.token: start[None]})
    vector = torch.nn.Parameter(start.clone())

    def loss(pipe: DiffusionPipeline, latents: torch.Tensor, conditions: Any, noise: Noise) -> torch.Tensor:
        # a function of the noise, so that held-out losses have the same prompts before and after
        drawn = (torch.special.ndtr(noise.noise.float().flatten(1)[:, 0]) * len(CONTEXTS)).long().tolist()
        contexts = [CONTEXTS[min(one, len(CONTEXTS) - 1)] for one in drawn]
        states, attention = context_losses(pipe, latents, contexts, noise, args.token, args.word)
        regularisation = args.states_weight * states + args.attention_weight * attention
        return denoising_loss(pipe, latents, conditions, noise) + regularisation

    with word_vector(pipe, args.token, vector):
        before, after, steps = fit(
            pipe,
            [vector],
            [picture for picture in pictures for _ in PROMPTS],  # the last pictures, with each prompt, are held out
            [prompt.format(args.token) for _ in pictures for prompt in PROMPTS],
            size=args.size,
            num_steps=args.num_steps,
            batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            held_out=max(1, round(0.1 * len(pictures))) / len(pictures),
            seed=args.seed,
            loss=loss,
        )
    with replacing(args.output / "learned_embeds.safetensors") as file:
        file.write(save({args.token: vector.detach().cpu()[None]}))
    report = {"pictures": len(pictures), "steps": steps, "loss_before": before, "loss_after": after}
    write_json(args.output / "report.json", report)
    print(f"Loss on held-out pictures: {before:.4f} before, {after:.4f} after {steps} steps. Saved in {args.output}.")
    return report


if __name__ == "__main__":
    main()

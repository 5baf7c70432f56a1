"""The toys' autoencoders: real diffusers classes, trained on rendered scenes before any denoiser."""

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan
from torch import nn

from dit_accel import compat
from dit_accel.scenes import render
from dit_accel.train.loop import LoopConfig, train
from dit_accel.train.toys.data import training_scene

KL_WEIGHT = 3e-4
WAN_CHANNELS, PIXART_CHANNELS, QWEN_CHANNELS = 12, 16, 4


def build_vae(toy: str) -> AutoencoderKLWan | AutoencoderKLQwenImage | AutoencoderKL:
    """The untrained autoencoder: `wan` 4x in space and time, `qwen_image` 2x and `pixart` 8x in space."""
    if toy == "wan":
        return AutoencoderKLWan(
            base_dim=16,
            z_dim=WAN_CHANNELS,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.0] * WAN_CHANNELS,
            latents_std=[1.0] * WAN_CHANNELS,
            scale_factor_temporal=4,
            scale_factor_spatial=4,
        )
    if toy == "qwen_image":
        return AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=QWEN_CHANNELS,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.0] * QWEN_CHANNELS,
            latents_std=[1.0] * QWEN_CHANNELS,
        )
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 96),
        layers_per_block=1,
        latent_channels=PIXART_CHANNELS,
        norm_num_groups=8,
        sample_size=256,
        mid_block_add_attention=False,
    )


def video_batch(seed: int, step: int, batch: int = 4, frames: int = 17, size: int = 64) -> torch.Tensor:
    """Training clips `[B, 3, F, H, W]` in [-1, 1]: a window of `frames` of each 33-frame clip."""
    rng = np.random.default_rng([seed, step])
    clips = []
    for _ in range(batch):
        scene, number = training_scene(rng, moving=True)
        start = rng.integers(0, 33 - frames + 1)
        clips.append(render(scene, number, 33, size, size)[start : start + frames])
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).mul(2).sub(1)


def image_batch(seed: int, step: int, batch: int = 6, size: int = 128, windows: bool = True) -> torch.Tensor:
    """Training pictures `[B, 3, H, W]` in [-1, 1]: whole scenes.

    With `windows` every other one is a part of a scene drawn twice as large.
    """
    rng = np.random.default_rng([seed, step])
    pictures = []
    for index in range(batch):
        scene, number = training_scene(rng, moving=False)
        if index % 2 or not windows:
            pictures.append(render(scene, number, 1, size, size)[0])
            continue
        y, x = rng.integers(0, size + 1, 2)
        pictures.append(render(scene, number, 1, 2 * size, 2 * size)[0, y : y + size, x : x + size])
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).mul(2).sub(1)


def reconstruct(vae: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Encodes, samples and decodes. Returns the UNCLAMPED reconstruction and the mean KL per latent value."""
    posterior = vae.encode(pixels).latent_dist
    latents = posterior.sample()
    kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    if takes_frames(vae):
        return compat.decode_unclamped(vae, latents), kl
    return vae.decode(latents).sample, kl


def takes_frames(vae: nn.Module) -> bool:
    """Whether `vae` sees `[B, C, F, H, W]` and normalises each latent channel: Wan's and Qwen-Image's do."""
    return isinstance(vae, AutoencoderKLWan | AutoencoderKLQwenImage)


def vae_loss(vae: nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """L1 + MSE + a little KL; the MSE pulls on the few hard edges, the L1 on the flat rest."""
    output, kl = reconstruct(vae, pixels)
    error = output.float() - pixels
    mse = error.square().mean()
    loss = error.abs().mean() + 2 * mse + KL_WEIGHT * kl
    psnr = -10 * torch.log10(mse.detach() / 4)
    return loss, {"loss": loss.item(), "psnr": psnr.item(), "kl": kl.item()}


@torch.no_grad()
def measure_statistics(vae: nn.Module, batches: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of the latents' channels, over batches of pixels `[B, 3, ...]`.

    Of samples, as the decoder saw them in training: a channel that the KL term has emptied is noise of
    scale 1 there, and dividing its mean by that mean's tiny spread would make a signal of it.
    """
    latents = torch.cat(
        [vae.encode(pixels).latent_dist.sample().transpose(0, 1).flatten(1) for pixels in batches], dim=1
    )
    return latents.mean(1), latents.std(1)


def training_batch(toy: str, seed: int, number: int) -> torch.Tensor:
    """Pixels of training step `number` as the autoencoder of `toy` takes them."""
    if toy == "wan":
        # most windows are short, for speed; every fourth is longer, so that the causal caches settle
        return video_batch(seed, number, 2, 17 if number % 4 == 3 else 9)
    if toy == "qwen_image":
        # its middle blocks attend over the whole picture, so it must know both sizes that it is used at
        whole = number % 2 == 1
        return image_batch(seed, number, 2 if whole else 6, 128 if whole else 64, not whole)[:, :, None]
    return image_batch(seed, number)


def train_vae(toy: str, config: LoopConfig) -> nn.Module:
    """Trains the autoencoder of `toy`; saves it, with its latents' statistics, in `config.folder / "vae"`."""
    torch.manual_seed(config.seed)
    vae = build_vae(toy)

    def loss_of(module: nn.Module, number: int) -> tuple[torch.Tensor, dict[str, float]]:
        return vae_loss(module, training_batch(toy, config.seed, number).to(next(module.parameters()).device))

    train(vae, loss_of, config, on_save=lambda _: save_vae(vae, toy, config))
    save_vae(vae, toy, config)
    return vae


@torch.no_grad()
def save_vae(vae: nn.Module, toy: str, config: LoopConfig) -> None:
    """Measures the latents' statistics on training scenes and writes the autoencoder in diffusers format."""
    if toy == "pixart":
        mean, std = measure_statistics(vae, [image_batch(config.seed, 1 << 20, 8, 256).to(vae.device)])
        vae.register_to_config(scaling_factor=1 / std.square().mean().sqrt().item())
    else:
        scenes = (
            video_batch(config.seed, 1 << 20, 8, 33)
            if toy == "wan"
            else image_batch(config.seed, 1 << 20, 32, 128, windows=False)[:, :, None]
        )
        mean, std = measure_statistics(vae, [scenes.to(vae.device)])
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    vae.save_pretrained(config.folder / "vae")

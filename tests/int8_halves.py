"""What tensor parallel 2 computes from int8 weights, on one card: the definition that two ranks are held to.

Weights and their scales per output channel are the same on one card and on two. The scale of an activation is not: in
W8A8 a rank takes it from its own half of the inputs of attention's and the MLP's last linear, which is finer than the
scale of the whole; equal scales would cost a collective more per linear.
"""

import torch

from ascend_kit.checkpoint.huggingface import open_checkpoint


class Halves(torch.nn.Module):
    """An int8 linear as the sum of two over half of the inputs each."""

    def __init__(self, kind, codes, scale, ops):
        super().__init__()
        self.parts = torch.nn.ModuleList(
            kind(part.contiguous(), scale.float().reshape(-1), None, ops) for part in codes.chunk(2, dim=1)
        )

    def forward(self, x):
        first, second = x.chunk(2, dim=-1)
        return self.parts[0](first.contiguous()) + self.parts[1](second.contiguous())


def halve(core, folder):
    """Replace the linears that tensor parallel splits by inputs, in a loaded core of one card."""
    checkpoint = open_checkpoint(folder)

    def halves(name, whole):
        codes, scale = checkpoint.read(f"{name}.weight"), checkpoint.read(f"{name}.weight_scale")
        target = core.device.torch_device
        return Halves(type(whole), codes.to(target), scale.to(target), whole.ops)

    for number, layer in enumerate(core.decoder.layers):
        layer.attention.out = halves(f"model.layers.{number}.self_attn.o_proj", layer.attention.out)
        layer.mlp.down = halves(f"model.layers.{number}.mlp.down_proj", layer.mlp.down)

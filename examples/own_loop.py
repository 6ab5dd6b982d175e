"""Pre-train in a loop of your own, on batches of your own: `python examples/own_loop.py --steps 150`."""

import argparse
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, TensorDataset

import unicode_fast as uf

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=150)
parser.add_argument("--clips", type=int, default=400)
parser.add_argument("--out", type=Path, default=Path("own-loop.safetensors"), help="a new file")
arguments = parser.parse_args()

# Two modalities of five positions. Each position has one of six events, which each modality shows in its own way.
torch.manual_seed(0)
events = torch.randint(6, (arguments.clips, 5))
radar = torch.randn(6, 40)[events] + 0.5 * torch.randn(arguments.clips, 5, 40)  # (clips, T, C)
depth = torch.randn(6, 9, 9, 3)[events] + 0.5 * torch.randn(arguments.clips, 5, 9, 9, 3)  # (clips, T, H, W, C)
loader = DataLoader(TensorDataset(radar, depth), batch_size=min(80, arguments.clips), shuffle=True, drop_last=True)

config = uf.preset("recommended").replace(width=64, codewords=32)
model = uf.make_model({"radar": uf.Modality("vector", (40,)), "depth": uf.Modality("grid", (9, 9, 3))}, config)
method = uf.make_method(model)
parameters = [parameter for group in model.parameter_groups().values() for parameter in group]
optimizer = torch.optim.Adam(parameters, lr=1e-3)
club_optimizer = torch.optim.Adam(model.club_parameters(), lr=1e-3)

# The first codewords are features of the first batch.
with torch.no_grad():
    first = model({"radar": radar[:80], "depth": depth[:80]})
    rows = torch.cat([z.flatten(0, 1) for z in first.semantic.values()])
    model.codebook.initialise(rows[torch.randperm(len(rows))[: model.codewords]])

step = 0
while step < arguments.steps:
    for one, other in loader:
        output = model({"radar": one, "depth": other})
        method.fit_club(output, club_optimizer)
        losses = method.losses(output)
        optimizer.zero_grad()
        losses.total.backward(inputs=parameters)
        for group in model.parameter_groups().values():
            clip_grad_norm_(group, config.train.clip_norm)
        optimizer.step()
        model.update_codebook(output)  # the MM-EMA step: codewords have no gradient
        if step % 50 == 0:
            print(f"step {step}: loss {losses.total.item():.3f}")
        step += 1
        if step == arguments.steps:
            break

uf.export(model, arguments.out)
model = uf.load(arguments.out)
same = (model.encode("radar", radar).index == model.encode("depth", depth).index).float().mean()
print(f"same code in both modalities: {100 * same:.0f} % of positions")

"""The shared codebook alone, in a model of your own: `python examples/codebook_only.py --steps 300`."""

import argparse

import torch
from torch import nn
from torch.nn.functional import normalize

import unicode_fast as uf

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=300)
arguments = parser.parse_args()

torch.manual_seed(0)
images_of, sounds_of = torch.randn(8, 32), torch.randn(8, 24)  # eight things in two modalities
encoders = nn.ModuleDict({"image": nn.Linear(32, 16), "sound": nn.Linear(24, 16)})
codebook = uf.Codebook(["image", "sound"], codewords=24, width=16)
optimizer = torch.optim.Adam(encoders.parameters(), lr=1e-2)


def draw(clips: int) -> dict[str, torch.Tensor]:
    """Features (clips, T, C) of both modalities: the same thing at the same position."""
    things = torch.randint(8, (clips, 5))
    return {
        "image": images_of[things] + 0.3 * torch.randn(clips, 5, 32),
        "sound": sounds_of[things] + 0.3 * torch.randn(clips, 5, 24),
    }


for step in range(arguments.steps):
    features = {name: encoders[name](given) for name, given in draw(64).items()}
    if step == 0:
        codebook.initialise(features["image"].detach().flatten(0, 1)[:24])
    # In training mode this ends with one MM-EMA step. A gradient passes straight through to the features.
    vector, index, commitment = codebook(features)
    clips = [normalize(features[name].mean(1), dim=-1) for name in ("image", "sound")]  # (64, 16) each
    loss = sum(commitment.values()) + uf.cross_info_nce(*clips, softmax_over="both", temperature=0.07).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

codebook.eval()  # no update from here on
with torch.no_grad():
    vector, index, commitment = codebook({name: encoders[name](given) for name, given in draw(200).items()})
same = (index["image"] == index["sound"]).float().mean()
print(f"codewords in use: {len(index['image'].unique())} by image, {len(index['sound'].unique())} by sound")
print(f"same code in both modalities: {100 * same:.0f} % of positions")
